from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.core.errors import UserError
from tasks.core.saga import Journal, project_lock
from tasks.core.settings import Settings


def test_entries_come_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    for number in range(3):
        journal.append("promoted", name="m", version=number)
    assert [entry["version"] for entry in journal.entries()] == [0, 1, 2]


@pytest.mark.parametrize("change", ["edit", "drop", "insert"])
def test_a_changed_journal_is_refused(tmp_path: Path, change: str) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    for number in range(3):
        journal.append("promoted", name="m", version=number)
    lines = journal.path.read_text().splitlines()
    if change == "edit":
        lines[1] = lines[1].replace('"version": 1', '"version": 7')
    elif change == "drop":
        del lines[1]
    else:
        lines.insert(1, json.dumps({"kind": "promoted", "before": "", "hash": ""}))
    journal.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="changed at line 2"):
        journal.entries()


def test_a_line_that_a_crash_cut_short_is_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.append("promoted", name="m", version=1)
    with journal.path.open("a") as out:
        out.write('{"kind": "promo')
    assert len(journal.entries()) == 1
    journal.append("promoted", name="m", version=2)
    assert [entry["version"] for entry in journal.entries()] == [1, 2]


def test_the_second_holder_is_told_who_is_first(tmp_path: Path) -> None:
    settings = Settings(tmp_path)
    with project_lock(settings), pytest.raises(UserError, match=r"another run .*process \d+"), project_lock(settings):
        pass
    with project_lock(settings):
        pass
