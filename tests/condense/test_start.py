"""Going on from an earlier condensed set: what fits, what is taken over, what descends from what, and which version is meant."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tasks.condense import _start, distribution_matching, krr_st
from tasks.core import catalog, erased
from tasks.core.dataset import SCHEMAS, Dataset, Info, Writer
from tasks.core.erased import Erased, Traces
from tasks.core.errors import UserError
from tasks.core.settings import Settings

LEARNED = krr_st.SMOKE.model_copy(
    update={"source_rows": 500, "dim": 16, "encoder_steps": 20, "outer_steps": 30, "inner_steps": 10, "outer_batch": 64}
)
STILL = {"start_steps": 0}


def stored(folder: Path, rows: pa.Table, info: Info, **changes: object) -> Dataset:
    """Rows as the stage writes them."""
    with Writer(folder, replace(info, schema="condensed", **changes)) as out:  # type: ignore[arg-type]
        out.write(rows)
    return Dataset.open(folder)


@pytest.fixture(scope="module")
def before(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Ten samples of the first 120 train rows, well learned."""
    data = tiny.take(np.arange(120))
    made = krr_st.krr_st(data, tiny.split("validation"), 10, LEARNED, seed=1)
    return stored(tmp_path_factory.mktemp("before") / "condensed", made.rows, data.info)


@pytest.fixture(scope="module")
def classes(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Twelve samples of the first 120 train rows, by class."""
    data = tiny.take(np.arange(120))
    made = distribution_matching.distribution_matching(data, tiny.split("validation"), 12, distribution_matching.SMOKE, seed=1)
    return stored(tmp_path_factory.mktemp("classes") / "condensed", made.rows, data.info)


def whole(rows: Dataset) -> pa.Table:
    return pa.table({name: rows.column(name) for name in SCHEMAS["condensed"].names})


def floats(rows: pa.Table | Dataset, column: str) -> np.ndarray:
    return np.array((rows.column(column) if isinstance(rows, Dataset) else rows[column]).to_pylist())


def test_on_the_same_rows_without_a_step_it_is_the_start_itself(tiny: Dataset, before: Dataset) -> None:
    data = tiny.take(np.arange(120))
    cfg = LEARNED.model_copy(update=STILL)
    made = krr_st.krr_st(data, tiny.split("validation"), 10, cfg, start=before, seed=1)
    for column in ("pixels", "target", "parents"):
        assert made.rows[column].to_pylist() == before.column(column).to_pylist()
    assert made.figures["start_targets_kept"] == 1
    assert made.figures["heldout_loss"] == made.figures["heldout_loss_start"]
    assert made.figures["pixels_moved"] == 0


def test_targets_of_another_encoder_give_way_to_those_of_today(tiny: Dataset, before: Dataset) -> None:
    data = tiny.take(np.arange(20, 140))
    own = krr_st.krr_st(data, tiny.split("validation"), 10, LEARNED.model_copy(update=STILL), start=before, seed=2)
    assert own.figures["start_targets_kept"] == 0
    assert np.array_equal(floats(own.rows, "pixels"), floats(before, "pixels"))
    assert not np.allclose(floats(own.rows, "target"), floats(before, "target"), atol=0.1)
    assert own.figures["heldout_loss_start"] < 1  # 1 is what the mean of all targets would reach


def test_it_goes_on_from_the_start_and_descends_from_both(tiny: Dataset, before: Dataset) -> None:
    data = tiny.take(np.arange(20, 140))
    cfg = LEARNED.model_copy(update={"start_steps": 20})
    made = krr_st.krr_st(data, tiny.split("validation"), 10, cfg, start=before, seed=2)
    assert made.figures["heldout_loss"] < made.figures["heldout_loss_start"]
    assert made.figures["pixels_moved"] > 0
    assert made.curve[-1]["step"] == 20
    first = [own[0] for own in before.column("parents").to_pylist()]
    every = set(data.ids()) | {name for own in before.column("parents").to_pylist() for name in own}
    assert len(every) == 140
    for own, name in zip(made.rows["parents"].to_pylist(), first, strict=True):
        assert len(own) == len(set(own))
        assert set(own) == every
        assert own[0] == name


def test_a_start_outranks_the_rows_to_begin_as(tiny: Dataset, before: Dataset) -> None:
    cfgs = [LEARNED.model_copy(update={"start_steps": 3, "init": init}) for init in ("random", "kmeans")]
    one, other = (krr_st.krr_st(tiny.take(np.arange(20, 140)), tiny.split("validation"), 10, cfg, start=before, seed=2) for cfg in cfgs)
    assert one.rows.equals(other.rows)
    assert one.figures == other.figures


def test_without_a_start_the_steps_of_one_are_not_taken(tiny: Dataset) -> None:
    data, held_out = tiny.split("train"), tiny.split("validation")
    plain, set_up = (krr_st.krr_st(data, held_out, 4, krr_st.SMOKE.model_copy(update=more)) for more in ({}, STILL))
    assert plain.rows.equals(set_up.rows)
    assert plain.figures == set_up.figures
    assert not {"heldout_loss_start", "start_targets_kept"} & plain.figures.keys()


def test_samples_of_classes_stay_in_their_classes(tiny: Dataset, classes: Dataset, tmp_path: Path) -> None:
    start = stored(tmp_path / "condensed", whole(classes).take(np.random.default_rng(0).permutation(12)), classes.info)
    cfg = distribution_matching.SMOKE.model_copy(update=STILL)
    made = distribution_matching.distribution_matching(
        tiny.take(np.arange(30, 150)), tiny.split("validation"), 12, cfg, start=start, seed=4
    )
    assert made.rows["label"].to_pylist() == sorted(start.labels().tolist())
    by_pixels = {tuple(np.round(row, 4)): label for row, label in zip(floats(start, "pixels"), start.labels(), strict=True)}
    assert [by_pixels[tuple(np.round(row, 4))] for row in floats(made.rows, "pixels")] == made.rows["label"].to_pylist()
    assert made.figures["heldout_loss"] == pytest.approx(made.figures["heldout_loss_start"], rel=1e-3)
    assert all(len(own) == len(set(own)) > 60 for own in made.rows["parents"].to_pylist())  # SMOKE looks at 60 rows, and so did the start


def test_a_start_of_other_classes_than_the_rows_is_an_error_that_names_both(tiny: Dataset, before: Dataset, classes: Dataset) -> None:
    held_out, cfg = tiny.split("validation"), distribution_matching.SMOKE
    few = tiny.where(tiny.labels() < 9).take(np.arange(120))
    with pytest.raises(UserError, match=r"samples of zero, one, .*, nine, but the data rows of zero, one, .*, eight: valid"):
        distribution_matching.distribution_matching(few, held_out, 12, cfg, start=classes)
    with pytest.raises(UserError, match="samples of no class, but the data rows of zero"):
        distribution_matching.distribution_matching(
            tiny.take(np.arange(120)), held_out, 10, cfg.model_copy(update={"dim": 16}), start=before
        )


@pytest.mark.parametrize("name", sorted(card.name for card in catalog.cards().values() if card.family == "condense"))
def test_methods_that_learn_nothing_name_those_that_do(name: str, tiny: Dataset, classes: Dataset) -> None:
    method = catalog.get(name)
    data, held_out = tiny.take(np.arange(120)), tiny.split("validation")
    if name.partition(".")[2] in _start.CAN:
        assert method.entry(data, held_out, 12, method.smoke, start=classes).rows.num_rows == 12
    else:
        with pytest.raises(UserError, match=f"{name} chooses anew .*; distribution_matching and krr_st can"):
            method.entry(data, held_out, 12, method.smoke, start=classes)


def test_a_start_that_does_not_fit_is_an_error_that_says_how(tiny: Dataset, before: Dataset, tmp_path: Path) -> None:
    rows = whole(before)
    orphans = rows.set_column(rows.schema.get_field_index("parents"), "parents", pa.array([[]] * 10, pa.list_(pa.string())))
    uneven = rows.set_column(rows.schema.get_field_index("pixels"), "pixels", pa.array([[0.0] * (60 + at) for at in range(10)]))
    for start, n, dim, said in (
        (before, 9, 16, "has 10 samples, but n is 9: set n to 10"),
        (before, 10, 8, "targets of length 16, wanted are 64 and 8: set dim to 16"),
        (tiny, 10, 16, "must hold condensed rows, .* schema 'image'"),
        (replace(before, info=replace(before.info, shape=(1, 16, 4))), 10, 16, r"shape \(1, 16, 4\), those of the data of \(1, 8, 8\)"),
        (replace(before, info=replace(before.info, classes=("a", "b"))), 10, 16, "of the classes a, b, the data of zero, one"),
        (stored(tmp_path / "orphans", orphans, before.info), 10, 16, "names no parents"),
        (stored(tmp_path / "uneven", uneven, before.info), 10, 16, "has 0 pixels"),
    ):
        with pytest.raises(UserError, match=said):
            _start.take_up(start, tiny, n, dim)


def test_what_was_erased_is_found_among_parents_and_by_class(before: Dataset, tmp_path: Path) -> None:
    def gone(*ids: str, name: str = "") -> Erased:
        folder = tmp_path / "-".join(("erased", *ids, name))
        erased.add(folder, Traces(frozenset(ids), frozenset()), "r-1", class_name=name)
        return Erased.read(folder)

    parent = before.column("parents").to_pylist()[3][-1]
    assert not _start.descends(before, Erased.read(tmp_path / "none"))
    assert not _start.descends(before, gone("d00399"))
    assert _start.descends(before, gone("d00399", parent))
    assert _start.descends(before, gone("d00398", name="three"))
    without = replace(before, info=replace(before.info, absent=("three",)))
    assert not _start.descends(without, gone("d00397", name="three"))


def test_only_a_version_that_stays_what_it_is_may_be_named(tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(tmp_path)]
    (tmp_path / "a").write_text("a")
    for words in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "one"], ["tag", "v1.0"]):
        subprocess.run([*git, *words], check=True)
    settings = Settings(tmp_path)
    commit = _start._commit(settings, "data/condensed@v1.0")
    assert _start._commit(settings, f"data/condensed@{commit[:8]}") == _start._commit(settings, f"data/condensed@{commit}") == commit
    for spec in ("data/condensed", "data/condensed@", "@v1.0", "", 3, ["data/condensed@v1.0"]):
        with pytest.raises(UserError, match=r"must name an earlier version, such as data/condensed@v1\.0"):
            _start._commit(settings, spec)
    for moving in ("HEAD", "main", "HEAD~0", "v1.0~0"):
        with pytest.raises(UserError, match=f"which DVC cannot see: write the commit, data/condensed@{commit[:12]}, or a tag"):
            _start._commit(settings, f"data/condensed@{moving}")
    for unknown in ("v2.0", "--help", "0123456789"):
        with pytest.raises(UserError, match=f"git knows no revision '{unknown}'"):
            _start._commit(settings, f"data/condensed@{unknown}")
