"""Every published claim belongs to the code beside it, follows from its values, and could have failed."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
import yaml

from flows import _claims, _measure
from tasks.core import catalog
from tasks.core.claim import NOT_HERE
from tasks.core.errors import UserError

NAMES = _claims.names()
WRITER = runpy.run_path(str(_claims.FOLDER / "__main__.py"), run_name="claims")


@pytest.mark.parametrize("name", NAMES)
def test_its_result_is_there_and_fresh(name: str) -> None:
    assert not _claims.stale(name), f"{name} is stale ({_claims.stale(name)}): run 'make claims'"


@pytest.mark.parametrize("name", NAMES)
def test_its_result_follows_from_its_values(name: str) -> None:
    found = _claims.published(name)
    assert found
    again = _measure.judged_again(found)
    assert {key: found[key] for key in again} == again
    assert len(found["seeds"]) >= 5
    assert found["seeds"] == list(range(len(found["seeds"])))


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_is_claimed_what_is_equal_and_what_was_tried(name: str) -> None:
    module = _claims.load(name)
    lines = (module.__doc__ or "").splitlines()
    for heading in ("Claim", "Arms", "Equal", "Tuned"):
        assert any(line.startswith(heading) for line in lines), f"the claim of {name} does not say: {heading}"
    assert module.CLAIM.seeds >= 5
    assert len(module.CLAIM.text) <= 160


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_with_its_idea_switched_off_it_does_not_hold(name: str) -> None:
    try:
        _measure.folders(_claims.load(name).CLAIM)
    except UserError as error:
        pytest.skip(str(error))
    on = _measure.run(name, [0], small=True, jobs=1)
    off = _measure.run(name, [0, 1, 2], small=True, jobs=1, off=True)
    assert off["status"] == NOT_HERE
    assert {metric: set(arms) for metric, arms in on["values"].items()} == {metric: set(arms) for metric, arms in off["values"].items()}
    first = {metric: {arm: column[:1] for arm, column in arms.items()} for metric, arms in off["values"].items()}
    assert first != on["values"], "the method is not what makes the method's arm"


def test_every_method_that_makes_something_has_a_claim_or_runs_in_one() -> None:
    makers = [card.name for card in catalog.cards().values() if card.family not in ("evaluate", "registry")]
    alone = [name for name in makers if name not in NAMES and not _claims.within(name)]
    assert not alone


def test_beside_the_claims_lies_nothing_else() -> None:
    for name in NAMES:
        folder = _claims.FOLDER / name.partition(".")[0]
        assert {path.suffix for path in folder.iterdir() if path.name != "__pycache__"} == {".py"}
    assert {path.stem for path in _claims.RESULTS.iterdir()} == set(NAMES)


def test_the_pipeline_has_one_stage_for_each_claim() -> None:
    assert WRITER["PIPELINE"].read_text(encoding="utf-8") == WRITER["pipeline"](), "run 'python -m tests.claims'"


def test_the_readme_shows_what_the_catalogue_and_the_results_say() -> None:
    assert WRITER["README"].read_text(encoding="utf-8") == WRITER["readme"](), "run 'python -m tests.claims'"


def test_the_lock_names_only_files_of_the_project_and_the_shared_data() -> None:
    locked = yaml.safe_load((_claims.FOLDER / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    for stage in locked.values():
        for entry in stage["deps"]:
            there = Path(os.path.normpath(_claims.FOLDER / entry["path"]))  # not `resolve`: the shared data may be a link
            assert not Path(entry["path"]).is_absolute()
            assert there.is_relative_to(catalog.ROOT) or there.is_relative_to(catalog.ROOT.parent / "shared")
