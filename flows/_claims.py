"""Claims on disk: finding them, what is published of them, and whether that still belongs to the code and data beside it."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from flows._code import code_digest
from tasks.core import catalog, files
from tasks.core.errors import UserError
from tasks.core.settings import THREADS, shared_data

FOLDER = catalog.ROOT / "tests" / "claims"
RESULTS = FOLDER / "results"
NOT_MEASURED: dict[str, Any] = {
    **dict.fromkeys(("status", "effect", "ci_low", "ci_high", "headline", "seconds")),
    **{"seeds": [], "data": {}, "arms": {}, "conditions": {}, "failures": {}},
}


def names() -> list[str]:
    """Methods that have a claim, sorted."""
    return sorted(f"{path.parent.name}.{path.stem}" for path in FOLDER.glob("*/*.py") if not path.name.startswith("_"))


def load(name: str) -> ModuleType:
    """Import the file of a claim. Raises UserError where there is none, ImportError where it is not a claim."""
    if name not in names():
        known = ", ".join(names()) or f"none: claims are measured in a checkout of the source, in {FOLDER}"
        raise UserError(f"there is no claim of {name!r}; there are: {known}")
    return _load(name)


@cache
def _load(name: str) -> ModuleType:
    path = FOLDER.joinpath(*name.split(".")).with_suffix(".py")
    if str(catalog.ROOT) not in sys.path:
        sys.path.insert(0, str(catalog.ROOT))  # claims import `tests.claims.samples`
    for variable, value in THREADS.items():
        os.environ.setdefault(variable, value)  # before the claim imports torch, here and in the processes that run seeds
    spec = importlib.util.spec_from_file_location(f"tests.claims.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [part for part in ("CLAIM", "measure", "switched_off") if not hasattr(module, part)]
    if missing:
        raise ImportError(f"{path}: a claim needs {', '.join(missing)}")
    return module


def published(name: str) -> dict[str, Any] | None:
    """The published result of a claim; None where there is none. Raises UserError where the file is damaged."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is damaged: measure it again with 'dvc repro' in tests/claims") from None
    return dict(found)


def code_of(name: str) -> list[Path]:
    """The files on which a claim's figures rest: the claim, its helpers, and every file of a family that it imports.

    `tasks/core` is left out: all claims stand on it, and any edit there would have all of them measured again. The scheduled run does that.
    """
    own = FOLDER.joinpath(*name.split(".")).with_suffix(".py")
    found = [own]
    for path in catalog.closure(f"tasks.{name}", *catalog.imported(own)):
        in_family = path.is_relative_to(catalog.TASKS) and path.relative_to(catalog.TASKS).parts[0] in catalog.families()
        if path.name != "__init__.py" and (in_family or path.is_relative_to(FOLDER)):
            found.append(path)
    return found


def digests(name: str) -> dict[str, str]:
    """The files on which a claim's figures rest, each with the digest of its code."""
    return {relative(path): code_digest(path.read_text(encoding="utf-8")) for path in code_of(name)}


def stale(name: str) -> str:
    """Why a published result does not belong to the code and data beside it; empty where it does, as far as can be seen here.

    Docstrings and comments may change. Data that is not on this machine cannot be compared and is passed over.
    """
    found = published(name)
    if found is None:
        return "never measured"
    known = locked().get(name.replace(".", "-"))
    if known is None:
        return "not made by the pipeline"
    measured = found.get("code", {})
    for path, digest in digests(name).items():
        if measured.get(path) != digest:
            shown = os.path.relpath(FOLDER / path, catalog.ROOT)
            return f"{shown} changed" if path in measured else f"rests on {shown} now"
    for path, md5 in known.items():
        if path in measured:
            continue
        if md5.endswith(".dir"):
            there = shared_data() / Path(path).name
            if there.is_dir() and files.folder_md5(there) != md5:
                return f"{there.name} is other data"
        elif not (FOLDER / path).is_file() or files.file_md5(FOLDER / path) != md5:
            return f"{os.path.relpath(FOLDER / path, catalog.ROOT)} changed"
    return ""


def relative(path: Path) -> str:
    """A path as the pipeline writes it: from the folder of the claims."""
    return Path(os.path.relpath(path, FOLDER)).as_posix()


def locked() -> dict[str, dict[str, str]]:
    """What the pipeline has locked: by stage the md5 of each dependency and output that is a file or folder of this project."""
    import yaml

    path = FOLDER / "dvc.lock"
    stages = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"] if path.is_file() else {}
    return {name: {entry["path"]: entry["md5"] for entry in [*stage["deps"], *stage["outs"]]} for name, stage in stages.items()}


def overview() -> list[dict[str, Any]]:
    """One record for each claim: its published result with `stale` (bool) and `why` (why it is). Without a result, figures are None."""
    found = []
    for name in names():
        card, reason = catalog.card(name), stale(name)
        known = published(name) or {"method": name, "claim": load(name).CLAIM.text, **NOT_MEASURED}
        found.append({**known, "paper": card.paper, "arxiv": card.arxiv, "stale": bool(reason), "why": reason})
    return found


def within(name: str) -> list[str]:
    """The claims in which a method runs as an arm or as the judge."""
    path = catalog.ROOT / catalog.card(name).path
    return [claim for claim in names() if claim != name and path in code_of(claim)]


def markdown() -> str:
    """The README's table of methods, from the catalogue and the published results."""
    from tasks.core.page_charts import DASH
    from tasks.core.page_claims import effect_text

    known = {found["method"]: found for found in overview()}
    lines = ["| method | paper | what is claimed | effect, 95% interval | status |", "|---|---|---|---|---|"]
    for name, card in catalog.cards().items():
        paper = f"[{card.paper}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else DASH
        if name in known:
            found = known[name]
            cells = [f"[{found['claim']}](tests/claims/{name.replace('.', '/')}.py)", effect_text(found), found["status"] or "not measured"]
        else:
            used = within(name)
            cells = [card.claim, DASH, f"runs in {', '.join(used)}" if used else "no claim yet"]
        lines.append(f"| [`{name}`]({card.path}) | {paper} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
