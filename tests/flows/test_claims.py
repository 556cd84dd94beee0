"""Claims on disk and on the command line, with a claim of a few lines whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flows import _claims, _measure, cli
from flows._code import code_digest
from tasks.core import files
from tasks.core.errors import UserError

TOY = """
from tasks.core.claim import Beats, Claim, Row
from tasks.core.errors import UserError
from tasks.filter import random

import time

BESIDES = Beats("method", "other", "loss", better="lower")
CLAIM = Claim("more is more", {data}, Beats("method", "baseline", "score", by=0.5), (BESIDES,), {seeds})

def measure(method, seed, data, small=False):
    if seed == 66:
        raise UserError("training diverged")
    gain = 1.0 if method is not switched_off else 0.0
    return [Row("method", "score", seed % 3 + gain + 0.01 * (seed % 2)), Row("baseline", "score", seed % 3),
            Row("method", "loss", 1.0 - gain / 2), Row("other", "loss", 1.0 + 0.1 * seed),
            Row("method", "score cost", time.monotonic())]

def switched_off(*arguments, **settings):
    raise AssertionError
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of claims with one of `filter.random`, and data of one file."""
    folder, data = tmp_path / "claims", tmp_path / "data" / "set"
    data.mkdir(parents=True)
    (data / "rows").write_text("rows")
    (folder / "filter").mkdir(parents=True)
    (folder / "filter" / "random.py").write_text(TOY.format(data='("set",)', seeds=5))
    monkeypatch.setattr(_claims, "FOLDER", folder)
    monkeypatch.setattr(_claims, "RESULTS", folder / "results")
    monkeypatch.setenv("RETORT_DATA", str(data.parent))
    _claims._load.cache_clear()
    return folder


def publish(folder: Path) -> None:
    """What `dvc repro` does: measure, write, lock."""
    found = _measure.run("filter.random", jobs=1)
    written = _measure.write(found, folder / "results")
    deps = [*_claims.code_of("filter.random"), folder.parent / "data" / "set"]
    md5 = {path: files.folder_md5(path) if path.is_dir() else files.file_md5(path) for path in [*deps, *written]}
    entries = {path: {"path": _claims.relative(path), "md5": value} for path, value in md5.items()}
    stage = {"deps": [entries[p] for p in deps], "outs": [entries[p] for p in written]}
    (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": {"filter-random": stage}}))


def test_a_claim_is_found_run_and_judged(toy: Path) -> None:
    found = _measure.run("filter.random", jobs=1)
    assert found["status"] == "holds"
    assert found["effect"] == pytest.approx(1.004)
    assert found["ci_low"] < found["effect"] < found["ci_high"]
    assert found["seeds"] == [0, 1, 2, 3, 4]
    assert found["data"] == {"set": files.folder_md5(toy.parent / "data" / "set")}
    assert found["values"]["score"]["baseline"] == [0, 1, 2, 0, 1]
    assert found["conditions"]["loss: method against other"]["status"] == "holds"
    assert not list(toy.glob("results/*"))


def test_switched_off_it_does_not_hold(toy: Path) -> None:
    assert _measure.run("filter.random", jobs=1, off=True)["status"] == "does not hold here"


def test_two_processes_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    name = _claims.names()[0]
    monkeypatch.setattr(_measure, "_one", _pretend)
    monkeypatch.setattr(_measure, "folders", lambda claim, data=None: [])
    rows = {seed: rows for seed, rows, _ in _measure._each(name, [3, 4, 5], [], False, True, 2)}
    assert rows == {seed: [("a", "b", float(seed))] for seed in (3, 4, 5)}


def _pretend(name: str, seed: int, *_: object) -> tuple[int, list[tuple[str, str, float]], str]:
    return seed, [("a", "b", float(seed))], ""


def test_a_seed_that_diverges_is_a_failure_and_shown_as_one(toy: Path) -> None:
    found = _measure.run("filter.random", [1, 2, 66], jobs=1)
    assert found["failures"] == {"66": "training diverged"}
    assert found["status"] == "does not hold here"
    assert found["values"]["score"]["method"][2] is None
    assert json.loads(json.dumps(found, allow_nan=False))
    assert found["conditions"][found["headline"]]["failed"] == 1
    with pytest.raises(UserError, match=r"no seed of the claim of filter\.random could be measured; the first said: training diverged"):
        _measure.run("filter.random", [66], jobs=1)


def test_a_published_result_is_fresh_until_something_below_it_changes(toy: Path) -> None:
    assert _claims.stale("filter.random") == "never measured"
    publish(toy)
    assert _claims.stale("filter.random") == ""
    changes = {
        toy / "filter" / "random.py": "changed",
        toy / "results" / "filter.random.json": "changed",
        toy / "results" / "filter.random.svg": "changed",
        toy.parent / "data" / "set" / "rows": "is other data",
    }
    for path, reason in changes.items():
        before = path.read_text()
        path.write_text(before + ("\nMORE = 1\n" if path.suffix == ".py" else " "))
        assert reason in _claims.stale("filter.random")
        path.write_text(before)
    assert _claims.stale("filter.random") == ""
    (toy / "dvc.lock").unlink()
    assert _claims.stale("filter.random") == "not made by the pipeline"


def test_other_words_about_the_same_code_make_nothing_stale(toy: Path) -> None:
    publish(toy)
    code = toy / "filter" / "random.py"
    code.write_text(f'"""Said at last, and\n\non more lines."""\n{code.read_text()}\n\n# a remark\n')
    assert _claims.stale("filter.random") == ""


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('"""A."""\nX = 1\n', '"""B.\n\nC."""\n\nX = 1  # one\n', True),
        ('def f():\n    """A."""\n    return "# no remark"\n', 'def f():\n    return "# no remark"\n', True),
        ("X = 1\n", "X = 2\n", False),
        ('X = """text"""\n', 'X = """other"""\n', False),
        ("if X:\n    Y = 1\nZ = 1\n", "if X:\n    Y = 1\n    Z = 1\n", False),
    ],
)
def test_a_digest_of_code_changes_with_the_code_alone(one: str, other: str, same: bool) -> None:
    assert (code_digest(one) == code_digest(other)) is same


def test_a_result_is_kept_where_changed_code_gives_the_first_seed_the_same_figures(toy: Path) -> None:
    assert _measure.kept("filter.random") is None
    publish(toy)
    before, code = _claims.published("filter.random"), toy / "filter" / "random.py"
    assert before
    text = code.read_text()
    for changed, same in ((f"{text}\nMORE = 1\n", True), (text.replace("gain / 2", "gain / 3"), False)):
        code.write_text(changed)
        _claims._load.cache_clear()
        kept = _measure.kept("filter.random")
        assert (kept is not None) is same
        if kept:
            assert kept == {**before, "code": _claims.digests("filter.random")} != before
    code.write_text(text.replace("by=0.5", "by=3.0"))  # what is asked for is judged anew, on the same figures
    _claims._load.cache_clear()
    assert (_measure.kept("filter.random") or {})["status"] == "holds in part"
    (toy.parent / "data" / "set" / "rows").write_text("others")
    assert _measure.kept("filter.random") is None


def test_data_that_is_not_here_makes_nothing_stale(toy: Path) -> None:
    publish(toy)
    (toy.parent / "data" / "set" / "rows").unlink()
    (toy.parent / "data" / "set").rmdir()
    assert _claims.stale("filter.random") == ""
    with pytest.raises(UserError, match="which is not there; name the folder of data sets in RETORT_DATA"):
        _measure.run("filter.random", jobs=1)


def test_a_result_edited_by_hand_does_not_follow_from_its_values(toy: Path) -> None:
    publish(toy)
    found = _claims.published("filter.random")
    assert found
    assert {key: found[key] for key in _measure.judged_again(found)} == _measure.judged_again(found)
    found["values"]["score"]["method"] = found["values"]["score"]["baseline"]
    assert _measure.judged_again(found)["status"] == "does not hold here"


def test_a_damaged_result_says_how_to_mend_it(toy: Path) -> None:
    publish(toy)
    (toy / "results" / "filter.random.json").write_text("{")
    with pytest.raises(UserError, match="damaged: measure it again"):
        _claims.published("filter.random")


def test_a_claim_without_its_parts_is_an_error(toy: Path) -> None:
    (toy / "filter" / "random.py").write_text("CLAIM = 1")
    with pytest.raises(ImportError, match="a claim needs measure, switched_off"):
        _claims.load("filter.random")


def ask(*words: str) -> str:
    ran = CliRunner().invoke(cli.app, list(words), catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return ran.stdout


def test_the_table_and_its_json(toy: Path) -> None:
    publish(toy)
    assert "holds" in ask("claims")
    [found] = json.loads(ask("claims", "--json"))
    assert {"method", "claim", "status", "effect", "ci_low", "ci_high", "seeds", "data", "seconds", "stale"} <= set(found)
    assert found["stale"] is False
    assert isinstance(found["seeds"], list)


def test_run_uses_the_seeds_and_data_that_are_asked_for_and_writes_nowhere(toy: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "rows").write_text("others")
    before = sorted(tmp_path.rglob("*"))
    words = ("claims", "run", "filter.random", "--first-seed", "100", "--seeds", "3", "--data", str(other), "--jobs", "1", "--json")
    found = json.loads(ask(*words))
    assert found["seeds"] == [100, 101, 102]
    assert found["data"] == {"elsewhere": files.folder_md5(other)}
    assert sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts) == before
    ask(*words, "--out", str(tmp_path / "out"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["filter.random.json", "filter.random.svg"]


def test_a_result_of_a_switched_off_claim_is_not_written(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no result: leave out --out"):
        ask("claims", "run", "filter.random", "--switched-off", "--out", str(tmp_path / "out"))
    with pytest.raises(UserError, match="--if-changed compares with the published result"):
        ask("claims", "run", "filter.random", "--if-changed", "--seeds", "2")
    assert "does not hold here" in ask("claims", "run", "filter.random", "--switched-off", "--jobs", "1")


def test_an_unknown_claim_names_those_that_are_there(toy: Path) -> None:
    with pytest.raises(UserError, match=r"no claim of 'filter.dnf'; there are: filter\.random"):
        ask("claims", "run", "filter.dnf")


def test_the_page_has_every_claim_with_figure_arms_and_commands(toy: Path, tmp_path: Path) -> None:
    (toy / "unlearn").mkdir()
    (toy / "unlearn" / "retrain.py").write_text(TOY.format(data="()", seeds=5))
    publish(toy)
    shown = ask("report", "claims", "--out", str(tmp_path / "page.html"))
    text = Path(shown.strip()).read_text()
    for wanted in (
        "1 of 2 claims hold",
        "filter.random",
        "score of method above that of baseline, by 0.5 or more",
        "retort claims run filter.random",
    ):
        assert wanted in text
    assert text.count("<svg") == 4  # the forest, and the figure of the one that was measured, each drawn for a desk and for a phone
    assert "stale: never measured" in text
    assert "<script" not in text
    assert "http://" not in text.replace("http://www.w3.org", "")
