"""Finds methods by their place, reads their cards without importing them, and says which modules each one stands on.

A method is the file `tasks/<family>/<name>.py`; files and folders that start with an underscore are not methods. Other packages add
methods through the entry point group `retort.methods` (name `family.method`, value `package.module`).
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from tasks.core.errors import UserError

TASKS = Path(__file__).resolve().parent.parent
ROOT = TASKS.parent
NOT_FAMILIES = {"core", "pool"}
PACKAGES = ("tasks", "flows", "tests")  # first-party: what a closure follows
CLASSIFIER, ANY = "classifier", "any"  # kinds of network that a method takes
IMAGES, CONDENSED = "image", "condensed"  # schemas of the rows that a method of family train reads


@dataclass(frozen=True)
class Card:
    """What is known of a method without importing it."""

    name: str  # family.method
    family: str
    paper: str
    arxiv: str
    claim: str
    path: str
    module: str
    summary: str


@dataclass(frozen=True)
class Method:
    """A method, imported: its card, its entry, its `Config` class and its `SMOKE` setting.

    takes  the kind of network that comes in: `classifier`, `any`, or the kind of a generator, as the module's `TAKES` says
    makes  the role of the network that comes out, where the module's `MAKES` names one: `generator`
    reads  the schema of the rows that a network is trained on, where the module's `READS` names another than `image`
    """

    card: Card
    entry: Any
    config: Any
    smoke: Any
    takes: str = CLASSIFIER
    makes: str = ""
    reads: str = IMAGES


def families() -> list[str]:
    """Names of the families, sorted."""
    return sorted(
        p.name
        for p in TASKS.iterdir()
        if p.is_dir() and (p / "__init__.py").exists() and p.name not in NOT_FAMILIES and not p.name.startswith("_")
    )


@cache
def cards() -> dict[str, Card]:
    """All methods by name, sorted. Raises ImportError where a file is no method or a name is taken twice."""
    found: dict[str, Card] = {}
    for name, module, path in _places():
        if name in found:
            raise ImportError(f"two methods are called {name}: {found[name].path} and {path}")
        found[name] = _read_card(name, module, path)
    return dict(sorted(found.items()))


def card(name: str) -> Card:
    """One method's card. Raises UserError that names the nearest methods where there is no such method."""
    known = cards()
    if name not in known:
        family = name.partition(".")[0]
        near = get_close_matches(name, known, n=1, cutoff=0.6)
        choice = [n for n in known if n.startswith(family + ".")] or list(known)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"there is no method {name!r}; {hint}valid here: {', '.join(choice)}")
    return known[name]


def get(name: str) -> Method:
    """Import one method. Raises UserError for an unknown name, ImportError for a file that breaks the contract."""
    found = card(name)
    module: ModuleType = importlib.import_module(found.module)
    short = name.partition(".")[2]
    missing = [part for part in ("Config", "SMOKE", short) if not hasattr(module, part)]
    if missing:
        raise ImportError(f"{found.path}: a method needs {', '.join(missing)}")
    kinds = (getattr(module, name, default) for name, default in (("TAKES", CLASSIFIER), ("MAKES", ""), ("READS", IMAGES)))
    return Method(found, getattr(module, short), module.Config, module.SMOKE, *kinds)


def configure(name: str, settings: dict[str, Any]) -> Any:
    """Make a method's `Config` from plain settings. Raises UserError that names the bad key and the valid ones."""
    from tasks.core.method import configured

    return configured(get(name).config, name, settings)


def closure(*modules: str) -> list[Path]:
    """The first-party files that the named modules import, themselves and late imports included, sorted."""
    seen: dict[str, Path] = {}
    todo = list(modules)
    while todo:
        module = todo.pop()
        path = _module_path(module)
        if path is None or module in seen:
            continue
        seen[module] = path
        parent = module.rpartition(".")[0]
        if parent:
            todo.append(parent)
        todo.extend(imported(path))
    return sorted(set(seen.values()))


def source_digest(*modules: str) -> str:
    """md5 over the files of `closure`: changes when anything that the modules run on changes."""
    total = hashlib.md5(usedforsecurity=False)
    for path in closure(*modules):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def _places() -> Iterator[tuple[str, str, Path]]:
    for family in families():
        for path in sorted((TASKS / family).glob("*.py")):
            if not path.name.startswith("_"):
                yield f"{family}.{path.stem}", f"tasks.{family}.{path.stem}", path
    for point in entry_points(group="retort.methods"):
        spec = importlib.util.find_spec(point.value)
        if spec is None or spec.origin is None:
            raise ImportError(f"entry point {point.name}: module {point.value} is not there")
        yield point.name, point.value, Path(spec.origin)


def _read_card(name: str, module: str, path: Path) -> Card:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    family, _, short = name.partition(".")
    entries = {node.name: mark for node in tree.body if isinstance(node, ast.FunctionDef) for mark in [_mark(node)] if mark}
    if list(entries) != [short]:
        raise ImportError(f"{path}: expected exactly one @method entry, named {short}; found {list(entries) or 'none'}")
    try:
        literals = {word.arg: ast.literal_eval(word.value) for word in entries[short].keywords if word.arg}
    except ValueError:
        raise ImportError(f"{path}: the arguments of @method must be literals") from None
    doc = ast.get_docstring(tree) or ""
    shown = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    return Card(
        name=name,
        family=family,
        paper=literals.get("paper", ""),
        arxiv=literals.get("arxiv", ""),
        claim=literals.get("claim", ""),
        path=shown,
        module=module,
        summary=doc.partition("\n")[0],
    )


def _mark(node: ast.FunctionDef) -> ast.Call | None:
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "method":
            return decorator
    return None


def _module_path(module: str) -> Path | None:
    if module.partition(".")[0] not in PACKAGES:
        return None
    base = ROOT.joinpath(*module.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def imported(path: Path) -> tuple[str, ...]:
    """Names that a file imports, late ones included, sorted: modules, and what is taken from them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return tuple(sorted(found))
