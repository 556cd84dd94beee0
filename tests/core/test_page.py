from __future__ import annotations

import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core import page as pages
from tasks.core import page_charts, page_graph, page_pictures
from tasks.core.dataset import Dataset
from tasks.core.metrics import Figure
from tasks.core.page import ClassRow, Gallery, Page, Picture, Scores, Stage
from tests.pages.examples import EVIL, REQUEST, decisions, example, forgetting, project, trees


@pytest.fixture(scope="module")
def folder(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project(tiny, tmp_path_factory.mktemp("project") / "data")


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return pages.render(example(folder))


class Watcher(HTMLParser):
    """Reads a page as a browser would: what it would load, which tags are open, what the pictures say."""

    void = frozenset(("meta", "link", "img", "br"))

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "xlink:href"):
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name in ("alt", "aria-label"):
                self.alts.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(html: str) -> Watcher:
    watcher = Watcher()
    watcher.feed(html)
    watcher.close()
    assert watcher.open == []
    return watcher


def parts(svg: str, tag: str, class_: str = "") -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter(tag) if class_ in e.get("class", "").split() or not class_]


# the page


def test_page_loads_nothing_and_runs_nothing(html: str) -> None:
    watcher = read(html)
    assert all(address.startswith(("data:", "#")) for address in watcher.addresses)
    assert not watcher.handlers
    assert not {"script", "iframe", "object", "embed", "form"} & set(watcher.tags)
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html
    assert len(html.encode()) < 3_000_000


def test_every_picture_says_what_it_shows(html: str) -> None:
    watcher = read(html)
    by_class = re.findall(r'alt="(?:real|generated) image of class', html)
    in_course = re.findall(r'alt="sample \d+ after \d steps', html)
    assert len(in_course) == 5 * 12
    assert watcher.tags.count("img") == 16 * 3 + 50 + len(by_class) + len(in_course)
    assert len(by_class) > 50
    assert len(watcher.alts) >= watcher.tags.count("img") + watcher.tags.count("svg")
    assert all(watcher.alts)


def test_what_comes_from_a_crawl_is_text_and_nothing_else(html: str) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "\u202e" not in html
    assert "\x00" not in html
    hostile = '"><script>x</script>'
    tree = {"kind": "source", "name": hostile, "id": hostile, "made_by": hostile, "inputs": []}
    shown = pages.render(
        Page(
            name=hostile,
            made_at="now",
            revision=hostile,
            trees=[tree],
            stages=[Stage(hostile, hostile, hostile, False, 1.0, hostile)],
            figures={hostile: {"accuracy": Figure(0.5, 0.4, 0.6), hostile: Figure.exact(1.0)}},
            details={"classes": [hostile, "b"], "confusion": {hostile: [[1, 2], [0, 3]]}, "rows": 6},
            promoted=[hostile],
            galleries=[Gallery(hostile, hostile, (Picture(np.zeros((1, 2, 2), np.uint8), hostile, False, hostile),), hostile)],
            class_rows=[ClassRow(hostile, (), ())],
            settings=hostile,
            versions={hostile: hostile},
        )
    )
    assert "<script" not in shown
    assert read(shown).tags.count("script") == 0


def test_no_sample_id_is_shown(html: str, folder: Path) -> None:
    for name in ("pool", "condensed", "generated"):
        assert not [i for i in Dataset.open(folder / name).ids() if i in html]


def test_page_has_what_its_readers_ask_for(html: str) -> None:
    words = " ".join(" ".join(read(html).words).split())
    for phrase in (
        "What was made from what", "Data Filtering Networks (2023)", "Avg. gap", "18% of retraining", "the reference", REQUEST,
        "caption is wrong", "✗ wrong", "50 learned samples", "7f3a90cc41d5e6f708192a3b4c5d6e7f.dir", "9c2bb04f1a2b+", "2.13.0",
    ):  # fmt: skip
        assert phrase in words or phrase in html, phrase
    assert "secret" not in html
    assert "sig=abc" not in html
    assert "prefers-color-scheme:dark" in html
    assert "@media print" in html


def test_page_is_drawn_in_little_time(folder: Path) -> None:
    began = time.process_time()
    pages.render(example(folder))
    assert time.process_time() - began < 3


def test_page_stays_small_with_large_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    large = [rng.integers(0, 256, (3, 224, 224), dtype=np.uint8) for _ in range(308)]
    shown = pages.render(Page(name="x", made_at="now", galleries=[Gallery("a", "", tuple(Picture(i) for i in large), "x")]))
    assert len(shown.encode()) < 3_000_000


def test_page_of_nothing_is_still_a_page() -> None:
    shown = pages.render(Page(name="empty", made_at="now"))
    assert "Nothing was offered for promotion" in read(shown).words
    assert 'id="models"' not in shown


def test_the_same_page_is_the_same_text(folder: Path, html: str) -> None:
    assert pages.render(example(folder)) == html


# verdicts


def test_headline_names_who_is_champion() -> None:
    assert pages.headline(decisions())[0] == "digits-student version 1 and digits-teacher version 2 are champions"
    assert pages.headline(decisions()[:1]) == (
        "digits-student version 1 is champion",
        "It met every rule of the gate on the held-out test rows.",
    )


def test_headline_names_who_was_refused_and_why() -> None:
    title, why = pages.headline(decisions(student=False))
    assert title == "digits-teacher version 2 is champion, digits-student version 1 was refused"
    assert "digits-student version 1 is held back because accuracy misses at least 0.5." in why
    title, why = pages.headline(decisions(student=False)[:1])
    assert title == "Nothing was promoted: digits-student version 1 was refused"
    assert "met every rule" not in why


def test_refused_version_is_never_shown_as_champion(folder: Path) -> None:
    alone = example(folder, decisions=decisions(student=False)[:1], aliases={}, promoted=[])
    words = read(pages.render(alone)).words
    assert "refused" in words
    assert "✗ missed" in words
    assert "champion" not in words


def test_verdict_without_rules_says_that_nothing_is_known() -> None:
    shown = pages.verdict({"name": "m", "version": 1, "promoted": False, "verdict": {}})
    assert shown["reason"] == "No reason was stored."
    assert pages.verdict({"name": "m", "version": 1, "promoted": True, "verdict": {}})["reason"] == "It stands as champion."


def test_verdict_shows_the_interval_of_a_comparison_only() -> None:
    student, teacher = (pages.verdict(d) for d in decisions())
    assert [rule["interval"] for rule in student["rules"]] == ["", ""]
    assert [rule["interval"] for rule in teacher["rules"]] == ["", "gain -0.017 to +0.006 (95%)"]
    assert (student["compared"], teacher["compared"]) == (False, True)


# tables and words


def test_void_comparison_says_so_in_words(folder: Path) -> None:
    figures, details = forgetting(void=True)
    shown = pages.render(example(folder, forgetting=figures, forgetting_details=details))
    assert "void" in read(shown).words
    assert "void" not in read(pages.render(example(folder))).words


def test_unlearning_rows_stand_in_a_fixed_order_and_unknown_metrics_come_last() -> None:
    figures, _ = forgetting()
    figures["other"] = {"ua": Figure.exact(1.0), "relearn_time": Figure.exact(3.0)}
    table = pages.table(figures, pages.FORGETTING_COLUMNS, pages.FORGETTING_ORDER)
    assert [name for name, _ in table["rows"]] == ["original", "unlearned", "finetune", "retrain", "other"]
    assert [head for head, _ in table["heads"]] == ["UA", "RA", "TA", "MIA", "Avg. gap", "ZRF", "relearn time"]
    assert table["rows"][4][1] == [("1.0", ""), *[("\u2013", "")] * 5, ("3", "")]
    assert table["rows"][1][1][0] == ("10.0", "7.0 \u2013 13.0")


def test_run_time_is_told_as_a_share_of_retraining() -> None:
    seconds = {"original": 8.0, "retrain": 4.0, "unlearned": 1.0}
    assert pages.run_time("unlearned", seconds) == ("1.0 s", "25% of retraining")
    assert pages.run_time("retrain", seconds) == ("4.0 s", "")
    assert pages.run_time("original", seconds) == ("8.0 s", "to train it")
    assert pages.run_time("finetune", seconds) == ("\u2013", "")
    assert pages.run_time("unlearned", {"unlearned": 1.0}) == ("1.0 s", "")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1797.0, "1,797"), (0.95, "0.95"), (0.12345, "0.1235"), (0.00001, "1.00e-05"), (0.0, "0"), (float("nan"), "\u2013"), (None, "\u2013")],
)
def test_plain_numbers(value: float | None, shown: str) -> None:
    assert pages.plain_number(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(10, "10 B"), (27560, "26.9 KiB"), (104976, "103 KiB"), (3 * 2**30, "3.0 GiB"), (2**50, "1048576 GiB")]
)
def test_sizes(value: float, shown: str) -> None:
    assert pages.size(value) == shown


@given(st.text(max_size=400))
def test_cleaned_text_is_one_short_line_of_visible_characters(text: str) -> None:
    shown = pages.clean(text)
    assert len(shown) <= pages.LONGEST_CAPTION
    assert shown == " ".join(shown.split())
    assert all(c.isprintable() for c in shown.replace(" ", ""))


def test_addresses_lose_their_secrets() -> None:
    assert pages.without_secrets("s3://key:word@bucket/a b@c") == "s3://bucket/a b@c"
    assert pages.without_secrets("source: https://h/x.parquet?X-Sig=1&t=2\nnext: 1") == "source: https://h/x.parquet\nnext: 1"


# charts


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_even_and_hold_the_range(low: float, wide: float) -> None:
    high = low + wide
    if not low < high:
        return
    marks = page_charts.ticks(low, high)
    assert marks[0] <= low + wide * 1e-6 + 1e-9
    assert marks[-1] >= high - wide * 1e-6 - 1e-9
    assert 2 <= len(marks) <= 8


def test_ticks_of_nothing_are_an_error() -> None:
    assert page_charts.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    with pytest.raises(ValueError, match="low < high"):
        page_charts.ticks(1, 1)


def test_dots_stand_where_their_values_are() -> None:
    figures = {"a": Figure(0.5, 0.4, 0.6), "b": Figure(0.7, 0.6, 0.8), "none": Figure.exact(float("nan"))}
    svg = page_charts.whiskers(figures, "Accuracy")
    x = [float(dot.get("cx", 0)) for dot in parts(svg, "circle")]
    ends = [(float(e.get("x1", 0)), float(e.get("x2", 0))) for e in parts(svg, "line", "whisker")]
    assert len(x) == 2
    assert ends[0][1] == pytest.approx(ends[3][0])  # both are 0.6
    assert x[1] - x[0] == pytest.approx(ends[0][1] - ends[0][0], abs=0.2)  # both are 0.2 wide
    assert "not measured" in svg
    assert page_charts.whiskers({"a": Figure.exact(1.0)}, "Accuracy")  # no width at all


def test_reliability_bars_part_into_what_was_earned_and_what_was_not() -> None:
    bins = [
        {"low": 0.4, "high": 0.6, "count": 1.0, "confidence": 0.5, "accuracy": 0.2},
        {"low": 0.8, "high": 1.0, "count": 3.0, "confidence": 0.9, "accuracy": 1.0},
    ]
    svg = page_charts.reliability(bins, "m")
    height = [[float(e.get("height", 0)) for e in parts(svg, "rect", look)] for look in ("bar", "over", "under", "count")]
    assert height == [[40, 180], [60], [20], [pytest.approx(34 / 3, abs=0.1), 34]]


def test_confusion_draws_what_happened_and_counts_what_is_wrong() -> None:
    svg = page_charts.confusion([[3, 1], [0, 4]], ["a", "b"], "m")
    assert [len(parts(svg, "rect", look)) for look in ("hit", "miss")] == [2, 1]
    assert [e.text for e in parts(svg, "text")][-3:] == ["3", "1", "4"]
    assert "8 samples, 1 of them wrong" in svg
    assert [e.get("fill-opacity") for e in parts(svg, "rect", "hit")] == ["0.92", "1.00"]


def test_confusion_of_many_classes_stays_small() -> None:
    counts = np.eye(200, dtype=int) * 9
    assert len(page_charts.confusion(counts.tolist(), [f"class {k}" for k in range(200)], "m")) < 60_000


def test_histogram_counts_every_row_once() -> None:
    svg = page_charts.histogram(np.array([0.0, 0.1, 1.0]), np.array([0.1]), ("right", "wrong"), 0.1, bins=10)
    said = [int((e.find("title").text or "").split()[0]) for e in parts(svg, "rect")]  # type: ignore[union-attr]
    assert sum(said) == 4
    assert "2 of 3 right and 1 of 1 wrong rows are kept" in svg
    assert page_charts.histogram(np.array([1.0]), np.array([]), ("kept", "rejected"), None)


def test_cut_is_drawn_only_where_a_score_parts_kept_from_rejected() -> None:
    values, clean = np.array([0.1, 0.2, 0.3]), np.array([True, False, True])
    assert "kept from 0.2" in pages._scores(Scores(values, np.array([False, True, True]), clean))
    assert "kept from" not in pages._scores(Scores(values, np.array([True, False, True]), clean))
    assert pages._scored(Scores(values, np.array([False, False, True]), clean)).startswith(
        "66.7% of the captions in the pool are right, and 100.0%"
    )
    assert pages._scored(Scores(values, np.array([False, False, True]), None)) == ""


def test_small_images_are_shown_exactly_and_large_ones_as_previews() -> None:
    import base64
    import io

    from PIL import Image

    def shown(image: np.ndarray) -> Any:
        kind, _, content = page_charts.data_uri(image).partition(";base64,")
        return kind, Image.open(io.BytesIO(base64.b64decode(content)))

    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (3, 5, 4), dtype=np.uint8)
    kind, picture = shown(small)
    assert kind == "data:image/png"
    assert np.array_equal(np.asarray(picture).transpose(2, 0, 1), small)
    kind, picture = shown(rng.integers(0, 256, (1, 300, 150), dtype=np.uint8))
    assert (kind, picture.size, picture.mode) == ("data:image/jpeg", (40, 80), "L")


# graph


def test_what_has_one_id_is_one_node() -> None:
    graph = page_graph.join(
        trees(), {"m-student1": "digits-student 1"}, {"m-student1": ["digits-student@champion"], "m-gone": ["x@champion"]}
    )
    assert len(graph.boxes) == 9
    assert graph.boxes["m-student1"].title == "digits-student"
    assert graph.boxes["m-student1"].foot == "version 1"
    assert graph.boxes["m-teacher1"].foot == "not registered"
    assert graph.boxes["a81be02f.dir"].title == "filtered"
    assert graph.edges["a81be02f.dir", "m-student1"] == ["", "rejected rows"]
    assert graph.edges["a81be02f.dir", "m-teacher2"] == [f"only {REQUEST}", f"without {REQUEST}"]


def test_columns_follow_the_longest_way_and_aliases_stand_last() -> None:
    graph = page_graph.join(trees(), {}, {"m-student1": ["a@champion"], "m-teacher1": ["b@champion"]})
    column = page_graph.columns(graph)
    names = (
        "digits",
        "7f3a90cc.dir",
        "a81be02f.dir",
        "0c44d1e9.dir",
        "5f6e7d8c.dir",
        "m-teacher1",
        "m-student1",
        "m-teacher2",
        "alias:b@champion",
    )
    assert [column[name] for name in names] == [0, 1, 2, 3, 3, 4, 5, 5, 6]


def test_a_cycle_is_an_error() -> None:
    boxes = {name: page_graph.Box(name, "data", name) for name in "ab"}
    with pytest.raises(ValueError, match="made from itself"):
        page_graph.columns(page_graph.Graph(boxes, {("a", "b"): [""], ("b", "a"): [""]}))


def test_boxes_do_not_overlap_and_edges_run_to_the_right() -> None:
    graph = page_graph.join(trees(), {}, {"m-student1": ["a@champion"]})
    spots, ways = page_graph.place(graph)
    boxes = [spots[id_] for id_ in graph.boxes]
    for i, (x, y) in enumerate(boxes):
        assert all(abs(x - x2) >= page_graph.WIDE or abs(y - y2) >= page_graph.TALL for x2, y2 in boxes[i + 1 :])
    for way in ways.values():
        columns = [spots[spot][0] for spot in way]
        assert np.allclose(np.diff(columns), page_graph.WIDE + page_graph.ACROSS)
    assert min(y for _, y in spots.values()) >= page_graph.THIN / 2


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=8))
def test_neighbours_keep_their_order_and_their_room(wanted: list[float]) -> None:
    graph = page_graph.Graph({str(k): page_graph.Box(str(k), "data", "") for k in range(len(wanted))})
    found = page_graph.apart(list(graph.boxes), wanted, graph)
    assert all(gap >= page_graph.TALL + page_graph.BETWEEN - 1e-6 for gap in np.diff(found))
    if all(gap >= page_graph.TALL + page_graph.BETWEEN for gap in np.diff(wanted)):
        assert np.allclose(found, wanted)


def test_an_edge_is_dashed_where_only_a_part_was_used() -> None:
    svg = page_graph.draw(page_graph.join(trees(), {}, {}))
    dashed = [e.find("title").text for e in parts(svg, "path", "part")]  # type: ignore[union-attr]
    assert dashed == [f"digits-teacher/2 from filtered: only {REQUEST}, without {REQUEST}"]


# rows


def test_scores_find_their_rows_whatever_their_order(folder: Path, tiny: Dataset) -> None:
    rows, scores = page_pictures.judged(folder / "pool", folder / "filtered")
    stored = dict(zip(tiny.ids(), Dataset.open(folder / "pool").audit("_clean").to_pylist(), strict=True))
    assert scores.clean is not None
    assert [stored[i] for i in rows.ids()] == scores.clean.tolist()
    assert len(rows) == len(scores.values) == 200
    assert sorted(Dataset.open(folder / "filtered").ids()) == sorted(np.array(rows.ids())[scores.kept])
    assert scores.values[scores.clean].mean() > scores.values[~scores.clean].mean()


def test_extremes_are_the_lowest_rejected_and_the_highest_kept(folder: Path) -> None:
    rows, scores = page_pictures.judged(folder / "pool", folder / "filtered")
    rejected, kept = page_pictures.extremes(rows, scores, 3)
    assert [p.note for p in rejected.pictures] == [f"{v:.3f}" for v in np.sort(scores.values)[:3]]
    assert [p.note for p in kept.pictures] == [f"{v:.3f}" for v in np.sort(scores.values)[::-1][:3]]
    assert rejected.pictures[0].caption == EVIL
    assert rejected.pictures[0].right is False


def test_rows_come_in_the_order_they_were_asked_for(tiny: Dataset) -> None:
    images, captions = tiny.images(), tiny.captions()
    found = page_pictures.rows_at(tiny, [7, 3, 7])
    assert [p.caption for p in found] == [captions[7], captions[3], captions[7]]
    assert all(np.array_equal(p.image, images[i]) for p, i in zip(found, (7, 3, 7), strict=True))
    assert page_pictures.rows_at(tiny, []) == []


def test_each_class_is_shown_beside_its_own_real_images(folder: Path, tiny: Dataset) -> None:
    made, real = Dataset.open(folder / "generated"), tiny.split("reference")
    found = page_pictures.by_class(real, made, 3, 20)
    assert [row.name for row in found] == list(tiny.info.classes)
    for label, row in enumerate(found):
        assert len(row.made) == 3
        own = real.images()[real.labels() == label]
        assert all(any(np.array_equal(image, other) for other in own) for image in row.real)
    without = page_pictures.by_class(real.where(real.labels() != 4), made, 3, 5)
    assert [len(row.real) > 0 for row in without] == [True, True, True, True, False]


@given(st.integers(0, 500), st.integers(1, 40))
def test_spread_positions_are_distinct_and_reach_both_ends(n: int, count: int) -> None:
    found = page_pictures.spread(n, count)
    assert len(found) == len(set(found)) <= min(n, count)
    assert found == sorted(found)
    if n >= 2 and count >= 2:
        assert (found[0], found[-1]) == (0, n - 1)


def test_a_pool_without_truth_shows_kept_against_rejected(folder: Path) -> None:
    _, scores = page_pictures.judged(folder / "pool", folder / "filtered")
    shown = pages._scores(replace(scores, clean=None))
    assert f"kept ({scores.kept.sum()})" in shown
    assert f"rejected ({(~scores.kept).sum()})" in shown


def test_the_long_tail_is_drawn_from_the_most_frequent_on() -> None:
    drawn = page_charts.long_tail({"rare": 2.0, "common": 90.0, "some": 30.0}, ("rare",), "Rows")
    bars = re.findall(r'<rect x="([\d.]+)"[^>]*height="([\d.]+)"[^>]*class="(\w+)"><title>([^<]+)', drawn)
    assert [title for *_, title in bars] == ["common: 90", "some: 30", "rare: 2, of the tail"]
    assert [look for *_, look, _ in bars] == ["first", "first", "second"]
    heights = [float(height) for _, height, *_ in bars]
    assert heights == pytest.approx([150, 50, 150 * 2 / 90], abs=0.1)
    assert "from 90 of common down to 2 of rare" in drawn
    assert page_charts.long_tail({"none": 0.0}, (), "Rows")
