"""`python -m tests.claims`: bring results, `dvc.yaml` and the README's table in line with the claims and statistics that are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import yaml

from flows import _claims, _measure
from tasks.core import catalog, files

PIPELINE = _claims.FOLDER / "dvc.yaml"
README = catalog.ROOT / "README.md"
TABLE = re.compile(r"(?<=<!-- methods -->\n).*?(?=<!-- /methods -->)", re.DOTALL)
HEAD = """\
# One stage for each claim, written by `python -m tests.claims`: DVC's foreach and matrix cannot give stages different dependencies.
# `dvc repro` here measures the claims whose code or data changed. The data is read from ../shared/data beside the project.
"""


def pipeline() -> str:
    """The text of `dvc.yaml`."""
    stages = {}
    for name in _claims.names():
        data = [f"../../../shared/data/{folder}" for folder in _claims.load(name).CLAIM.data]
        code = [os.path.relpath(path, _claims.FOLDER) for path in _claims.code_of(name)]
        stages[name.replace(".", "-")] = {
            # the data that is measured on must be the data that is listed, whatever the environment says
            "cmd": f"cd ../.. && env -u RETORT_DATA python -m flows.cli claims run {name} --if-changed --out tests/claims/results",
            "deps": [*sorted(code), *data],
            # they stay while they are made again: what is published is compared with
            "outs": [{f"results/{name}.svg": {"cache": False, "persist": True}}],
            "metrics": [{f"results/{name}.json": {"cache": False, "persist": True}}],
        }
    return HEAD + yaml.safe_dump({"stages": stages}, sort_keys=False, width=140)


def readme() -> str:
    """The README with its table of methods as the catalogue and the results have it."""
    return TABLE.sub(lambda _: _claims.markdown(), README.read_text(encoding="utf-8"))


def restate() -> list[str]:
    """Work the figures of every fresh result out anew from its values, for when the statistics have changed; give the stages that DVC must
    be told of: those, and such as have other docstrings or comments only.

    A result that is stale, or was changed by hand, is left for `dvc repro`.
    """
    changed = []
    locked = _claims.locked()
    for name in _claims.names():
        found = None if _claims.stale(name) else _claims.published(name)
        if found is None:
            continue
        again = _measure.judged_again(found)
        if {key: found[key] for key in again} != again:
            _measure.write({**found, **again}, _claims.RESULTS)
            changed.append(name.replace(".", "-"))
        elif any(files.file_md5(_claims.FOLDER / path) != locked[name.replace(".", "-")].get(path) for path in found["code"]):
            changed.append(name.replace(".", "-"))
    return changed


if __name__ == "__main__":
    if stages := restate():
        subprocess.run([sys.executable, "-m", "dvc", "commit", "-q", "-f", *stages], cwd=_claims.FOLDER, check=True)
    files.write_text(PIPELINE, pipeline())
    files.write_text(README, readme())
