"""Every page as a reader sees it: in a browser, on a phone and on a desk, by day and by night."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks.core.dataset import Dataset
from tasks.core.page import Page, render, render_card, render_verdict
from tasks.core.page_certificate import render_certificate
from tests import workspace
from tests.pages import chromium, examples

pytestmark = pytest.mark.timeout(600)

CHECKS = Path(__file__).with_name("checks.js").read_text(encoding="utf-8")
WIDTHS = (360, 1280)
MD5 = "7f3a90cc41d5e6f708192a3b4c5d6e7f.dir"


def verdict(at: int, student: bool = True) -> str:
    found = examples.decisions(student=student)[at]
    basis = {**found["verdict"]["basis"], "mode": "enforce"}
    return render_verdict(found["name"], found["version"], {**found["verdict"], "basis": basis}, {"pool": MD5}, "2026-10-30")


def hard_verdict(folder: Path) -> str:
    found = examples.hard(folder).decisions[0]
    basis = {**found["verdict"]["basis"], "mode": "dry-run", "evidence": examples.UNBROKEN, "gate": examples.LONG}
    data = {examples.LONG: examples.UNBROKEN}
    return render_verdict(examples.LONG, 12345, {**found["verdict"], "promote": False, "basis": basis}, data, "2026-10-30")


def unfolded(page: str) -> str:
    """The page with everything open that can be."""
    assert "<details " in page
    return page.replace("<details ", "<details open ")


# a page by its name: a line more for each page more
PAGES: dict[str, Callable[[Path], str]] = {
    "report": lambda folder: render(examples.example(folder)),
    "report-hard": lambda folder: render(examples.hard(folder)),
    "report-hard-few": lambda folder: render(examples.hard(folder, examples.CLASSES[:8])),
    "report-bare": lambda folder: render(examples.bare()),
    "report-empty": lambda folder: render(Page(name="empty", made_at="now")),
    "verdict-met": lambda folder: verdict(1),
    "verdict-refused": lambda folder: verdict(0, student=False),
    "verdict-hard": hard_verdict,
    "card": lambda folder: render_card(examples.card()),
    "card-new": lambda folder: render_card(examples.card(figures={}, measured_on={}, verdict={}, aliases=(), sources=(), limits="")),
    "card-revoked": lambda folder: render_card(examples.card(aliases=(), revoked=True, request=examples.REQUEST)),
    "card-hard": lambda folder: render_card(examples.hard_card()),
    "certificate": lambda folder: render_certificate(examples.certificate()),
    "certificate-open": lambda folder: unfolded(render_certificate(examples.certificate())),
    "certificate-hard-open": lambda folder: unfolded(render_certificate(examples.hard_certificate())),
    "certificate-waiting": lambda folder: render_certificate(examples.waiting_certificate()),
    "certificate-empty": lambda folder: render_certificate(examples.empty_certificate()),
    "certificate-hard": lambda folder: render_certificate(examples.hard_certificate()),
    "claims": lambda folder: examples.claims([examples.claim(name) for name in ("filter.dfn", "train.one", "unlearn.two")]),
    "claims-hard": lambda folder: examples.claims(examples.hard_claims()),
    "claims-none": lambda folder: examples.claims([]),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Browser]:
    path = chromium.find()
    if path is None:
        pytest.skip(f"needs a browser: one of {', '.join(chromium.NAMES)}")
    with chromium.Browser(path) as found:
        yield found


@pytest.fixture(scope="module")
def folder(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return examples.project(tiny, tmp_path_factory.mktemp("project") / "data")


def complaints(browser: chromium.Browser, path: Path) -> list[str]:
    """What is wrong with a page at any width, by day or by night. With RETORT_SHOTS, pictures of it are left in that folder."""
    found = []
    for width in WIDTHS:
        for dark in (False, True):
            where = f"{width} px, {'dark' if dark else 'light'}"
            browser.open(path, width, dark)
            elsewhere = [url for url in browser.asked if url != path.as_uri() and not url.startswith("data:")]
            wrong = [*browser.said, *(f"asks for {url}" for url in elsewhere), *browser.js(f"({CHECKS})({width})")]
            found += [f"{where}: {line}" for line in wrong]
            if shots := os.environ.get("RETORT_SHOTS"):
                browser.screenshot(Path(shots) / f"{path.stem}-{width}-{'dark' if dark else 'light'}.png")
    return found


BAD = """<!doctype html><html lang="en"><title>bad</title><style>body{background:#fff;color:#999}</style>
<h1>One</h1><h3>Three</h3><nav><a href="#gone">x</a></nav><div style="width:2000px">wide</div>
<div style="width:50px;overflow:hidden;white-space:nowrap">this text is cut off somewhere</div><p style="font-size:9px">nan</p>
<img src="http://127.0.0.1:9/x.png"><svg width="50" height="20"><text x="40" y="10">outside</text></svg>
<table><tr><td>a</td></tr></table><script>console.error("oh"); null.x</script>"""


def test_what_is_wrong_with_a_page_is_seen(browser: chromium.Browser, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text(BAD, encoding="utf-8")
    found = "\n".join(complaints(browser, path))
    for said in (
        *(
            "error: oh",
            "exception: ",
            "asks for http://127.0.0.1:9/x.png",
            "not loaded",
            "a level of headings",
            "the page is 20",
            "cut off by",
        ),
        *("contrast 2.8", "text of 9.0 px", "a value of the program", "text leaves its picture", "a picture without text", "#gone"),
        *("a picture that does not load", "a drawing without text", "a table without headings", "a target of"),
    ):
        assert said in found, said


@pytest.mark.parametrize("name", PAGES)
def test_a_reader_has_nothing_to_complain_of(name: str, browser: chromium.Browser, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.html"
    path.write_text(PAGES[name](folder), encoding="utf-8")
    found = complaints(browser, path)
    assert not found, "\n".join(found)


def test_so_it_is_with_the_pages_of_a_real_run(finished: Path, browser: chromium.Browser, tmp_path: Path) -> None:
    made = [workspace.retort(finished, "card", name) for name in ("digits-student@champion", "digits-teacher/1")]
    claims = workspace.retort(finished, "report", "claims", "--out", str(tmp_path / "claims.html"))
    assert claims.returncode == 0, claims.stdout + claims.stderr
    cards = [Path(ran.stdout.split()[-1]) for ran in made]
    paths = [*(finished / ".retort" / "reports").glob("digits-*.html"), *cards, tmp_path / "claims.html"]
    paths += list((finished / ".retort").rglob("verdict-*.html"))
    assert len(paths) >= 6
    found = {path.name: complaints(browser, path) for path in paths}
    assert not any(found.values()), "\n".join(f"{name}: {line}" for name, lines in found.items() for line in lines)
