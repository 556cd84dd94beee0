from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tasks.core import catalog
from tasks.core.errors import UserError

CARD = '"""A method."""\nfrom tasks.core.method import method\n@method(paper="p", claim="c")\ndef {name}(): ...\n'


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of families of its own."""
    monkeypatch.setattr(catalog, "TASKS", tmp_path / "tasks")
    monkeypatch.setattr(catalog, "ROOT", tmp_path)
    family = tmp_path / "tasks" / "filter"
    family.mkdir(parents=True)
    (family / "__init__.py").touch()
    catalog.cards.cache_clear()
    yield family
    catalog.cards.cache_clear()


def test_a_method_is_found_by_its_place(house: Path) -> None:
    (house / "good.py").write_text(CARD.format(name="good"))
    (house / "_shared.py").write_text("")
    assert list(catalog.cards()) == ["filter.good"]


@pytest.mark.parametrize(
    "text",
    [CARD.format(name="other"), "x = 1\n", CARD.format(name="bad") + CARD.format(name="bad2"), CARD.format(name="bad").replace('"p"', "P")],
    ids=["misnamed", "no entry", "two entries", "not literal"],
)
def test_a_file_that_is_no_method_is_an_error(house: Path, text: str) -> None:
    (house / "bad.py").write_text(text)
    with pytest.raises(ImportError, match=r"bad\.py"):
        catalog.cards()


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean filter\.dfn\?"):
        catalog.card("filter.dfm")
    with pytest.raises(UserError, match=r"valid here: .*filter\.dfn"):
        catalog.card("filter.zzzzzz")


def test_an_unknown_setting_lists_the_valid_ones() -> None:
    with pytest.raises(UserError, match=r"no setting 'keeep'; did you mean 'keep'\? valid: .*keep"):
        catalog.configure("filter.dfn", {"keeep": 0.5})


def test_a_value_out_of_range_is_named() -> None:
    with pytest.raises(UserError, match=r"setting 'keep' is 2, but: .*less than or equal to 1"):
        catalog.configure("filter.dfn", {"keep": 2})


def test_the_closure_holds_late_imports_and_packages() -> None:
    names = {str(p.relative_to(catalog.ROOT)) for p in catalog.closure("tasks.filter.dfn")}
    assert {"tasks/__init__.py", "tasks/filter/__init__.py", "tasks/filter/dfn.py", "tasks/core/dataset.py", "tasks/core/loop.py"} <= names
    assert not any(name.startswith("flows/") for name in names)


def test_the_digest_follows_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("")
    (tmp_path / "tasks" / "a.py").write_text("import tasks.b\n")
    (tmp_path / "tasks" / "b.py").write_text("x = 1\n")
    monkeypatch.setattr(catalog, "ROOT", tmp_path)
    before = catalog.source_digest("tasks.a")
    (tmp_path / "tasks" / "b.py").write_text("x = 2\n")
    assert catalog.source_digest("tasks.a") != before


def test_listing_does_not_import_torch() -> None:
    code = "import sys; from tasks.core import catalog; catalog.cards(); sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=catalog.ROOT, check=False).returncode == 0
