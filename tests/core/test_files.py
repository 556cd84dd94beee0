from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.core import files


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "data"
    with files.replacing_folder(target) as fresh:
        (fresh / "a").write_text("old")
    with pytest.raises(RuntimeError, match="stop"), files.replacing_folder(target) as fresh:
        (fresh / "a").write_text("new")
        raise RuntimeError("stop")
    assert (target / "a").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_what_a_dead_writer_left_is_removed(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from tasks.core import files\n"
        "with files.replacing_folder(Path(sys.argv[1])) as fresh:\n"
        "    (fresh / 'a').write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    target = tmp_path / "data"
    ran = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert ran.returncode == -9
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 1
    with files.replacing_folder(target) as fresh:
        (fresh / "a").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    files.write_text(path, "one")
    files.write_text(path, "two")
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["a.txt"]


def test_folder_md5_is_the_one_that_dvc_gives(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    for name in ("b", "a", "sub/c", "sub.x"):
        (folder / name).write_text(name)
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db.local import LocalHashFileDB
    from dvc_objects.fs.local import LocalFileSystem

    fs = LocalFileSystem()
    _, _, tree = build(LocalHashFileDB(fs, str(tmp_path / "odb")), str(folder), fs, "md5", dry_run=True)
    assert files.folder_md5(folder) == tree.hash_info.value


def test_an_exclusive_file_waits_for_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    script = "import sys; from pathlib import Path; from tasks.core import files\nwith files.exclusive(Path(sys.argv[1])): print('in')"
    with files.exclusive(lock):
        child = subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1.0)
    assert child.communicate(timeout=20)[0].strip() == b"in"


def test_a_cache_keeps_what_was_used_last_up_to_its_bounds(tmp_path: Path) -> None:
    now = time.time()
    for at, name in enumerate(["a", "b", "c", "old"]):
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (now - at * 60, now - at * 60))
    os.utime(tmp_path / "old", (now - 10 * 86400,) * 2)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "part").write_bytes(b"x" * 50)
    (tmp_path / ".being-written").write_bytes(b"x" * 10_000)
    assert files.bound(tmp_path, most_bytes=1e9, days=9) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".being-written", "a", "b", "c", "folder"]
    folder = sum(part.stat().st_size for part in (tmp_path / "folder", tmp_path / "folder" / "part"))
    assert files.bound(tmp_path, most_bytes=folder + 250, days=9) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".being-written", "a", "b", "folder"]
    assert files.bound(tmp_path / "absent", most_bytes=1, days=1) == 0
