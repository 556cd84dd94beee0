"""The README's commands are run, so that none of them can go stale."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.core import catalog
from tests import workspace

README = (catalog.ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_there_are_commands_to_run() -> None:
    assert {"make run", "make test", "retort run", "dvc status"} <= set(COMMANDS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_works(command: str, finished: Path) -> None:
    words = shlex.split(command)
    if words[0] == "make":  # it would set up the very environment that runs this test: that its recipe can be made is what is checked
        ran = subprocess.run(["make", "-n", words[1]], cwd=catalog.ROOT, capture_output=True, text=True, check=False)
        assert words[1] != "run" or "retort run" in ran.stdout
        assert words[1] != "test" or "pytest" in ran.stdout
    elif words[0] == "retort":
        ran = workspace.retort(finished, *words[1:])
    else:
        module = {"dvc": ["-m", "dvc"], "python": []}[words[0]]
        command_line = [sys.executable, *module, *words[1:]]
        ran = subprocess.run(command_line, cwd=finished, env=workspace.environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_folder_and_file_that_the_readme_names_is_there() -> None:
    for name in ("flows", "tasks", "data", "dvc.yaml", "params.yaml", "tests"):
        assert (catalog.ROOT / name).exists()
    for name in re.findall(r"`(tasks/[\w/]+\.py)`", README):
        assert (catalog.ROOT / name).is_file(), name


def test_the_excerpt_is_what_a_run_prints(finished: Path) -> None:
    excerpt = re.search(r"<!-- excerpt -->\n```\n(.*?)```\n<!-- /excerpt -->", README, re.DOTALL)
    assert excerpt, "the README has no excerpt of a run"
    shown = (finished / "first-run.txt").read_text()
    for line in excerpt[1].splitlines():
        cells = [cell.strip() for cell in line.split("│")]
        if len(cells) > 3 and cells[1]:
            assert cells[1] in shown
            assert cells[2] in shown


def test_make_is_there() -> None:
    assert shutil.which("make")
