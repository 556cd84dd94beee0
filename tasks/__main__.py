"""`python -m tasks`: list the methods, run a data stage, or try any method at its smallest.

python -m tasks                        every method, a line each
python -m tasks pool                   the stage that reads the source
python -m tasks filter.dfn             a data stage with this method, set by params.yaml
python -m tasks unlearn.l1_sparse --card   what the method is
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import sys
import time
from pathlib import Path

from tasks.core import catalog
from tasks.core.errors import UserError
from tasks.core.settings import THREADS, project

os.environ.update({name: os.environ.get(name, value) for name, value in THREADS.items()})


def main(arguments: list[str] | None = None) -> int:
    """Give the exit status: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m tasks", description="List methods, or run a data stage.")
    parser.add_argument("name", nargs="?", help="pool, or a method such as filter.dfn")
    parser.add_argument("--card", action="store_true", help="say what the method is, and run nothing")
    parser.add_argument("--engine", choices=["local", "ray"], help="where a filter scores; ray: on a cluster; the result is the same")
    asked = parser.parse_args(arguments)
    if asked.engine:
        os.environ["RETORT_ENGINE"] = asked.engine
    try:
        if asked.name is None:
            for card in catalog.cards().values():
                sys.stdout.write(f"{card.name:28} {card.claim}\n")
        elif asked.card:
            sys.stdout.write(json.dumps(catalog.card(asked.name).__dict__, indent=1) + "\n")
        else:
            run_stage(asked.name)
    except UserError as error:
        return _say(str(error))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _say(f"no space left for {error.filename or 'the data'}: free some and run again; the last good version is untouched")
    return 0


def run_stage(name: str) -> None:
    """Run a data stage in the project around the working folder."""
    family, _, method = name.partition(".")
    if family != "pool":
        catalog.card(name)
    stage = getattr(importlib.import_module(f"tasks.{family}"), "stage", None)
    if stage is None:
        raise UserError(f"{name} is no data stage; run it through its flow: retort {family}")
    began = time.perf_counter()
    _tell(stage=family, state="start", method=method or "read")
    try:
        stage(project(), method)
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        _tell(fault=f"stage {family} failed: {type(error).__name__}: {error}")
        raise
    _tell(stage=family, state="end", seconds=round(time.perf_counter() - began, 2))


def _say(sentence: str) -> int:
    _tell(error=sentence)
    sys.stderr.write(f"error: {sentence}\n")
    return 2


def _tell(**event: object) -> None:
    channel = os.environ.get("RETORT_PROGRESS")
    if channel:
        with Path(channel).open("a", encoding="utf-8") as out:
            out.write(json.dumps(event) + "\n")


if __name__ == "__main__":
    sys.exit(main())
