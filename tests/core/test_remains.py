from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import sqlite3
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.core.dataset import encode, write_parquet
from tasks.core.erasure import _look
from tasks.core.erasure._look import Looker, Unreadable
from tasks.core.erasure._words import Words
from tasks.core.erasure.remains import Report, search
from tests import planted
from tests.planted import ERASED, IDS, PIXELS, TRACES, Planted


def looker(folder: Path) -> Looker:
    return Looker(TRACES, {(1, 8, 8)}, folder)


def look(path: Path, content: bytes) -> set[str]:
    path.write_bytes(content)
    return set(looker(path.parent).look(path).carries)


def found(report: Report) -> set[tuple[str, str, str]]:
    return {(one.place, one.path, one.what) for one in report.found}


def test_every_planted_trace_is_found_and_named_and_nothing_else(past: Planted) -> None:
    report = search(past.settings, past.store, TRACES)
    shard = planted.files.file_md5(past.settings.root / "data" / ".pool.new-1234" / "part-00000.parquet")
    made = next(entry["md5"] for entry in manifest(past, past.generated["held"]) if entry["relpath"] == "part-00001.parquet")
    stores = {
        (place, f"files/md5/{md5[:2]}/{md5[2:]}", what)
        for place in ("DVC cache", "DVC remote local", "DVC remote spare")
        for md5, what in ((shard, "id"), (shard, "image"), (made, "parent"))
    }
    runs = f".retort/artifacts/retort/{past.tainted.run_id}/artifacts"
    version = f".retort/cache/versions/{past.pools['held']}/pool/part-00001.parquet"
    assert found(report) == stores | {
        ("MLflow artifacts", f"{runs}/chosen.json", "id"),
        ("MLflow artifacts", f"{runs}/page.html", "image"),
        ("MLflow artifacts", f"{runs}/per_sample.parquet", "id"),
        ("MLflow artifacts", f".retort/artifacts/retort/{past.other.run_id}/artifacts/per_sample.parquet", "id"),
        ("Prefect results", ".retort/prefect/storage/key", "id"),
        ("caches", f".retort/cache/decoded/{past.pools['held']}.npy", "image"),
        ("caches", version, "id"),
        ("caches", version, "image"),
        ("logs and journals", ".retort/logs/a.log", "id"),
        ("logs and journals", ".retort/progress.jsonl", "id"),
        ("reports", ".retort/reports/held.html", "image"),
        ("requests", ".retort/requests/r-held.parquet", "id"),
        ("temporary folders", "data/.pool.new-1234/part-00000.parquet", "id"),
        ("temporary folders", "data/.pool.new-1234/part-00000.parquet", "image"),
    }
    assert report.unread == []
    assert report.counts["DVC cache"].rows == report.counts["DVC remote spare"].rows > 12
    assert report.counts["git history"].files > 9
    said = json.dumps(report.to_json())
    assert ERASED not in said
    assert report.to_json()["found"] == len(report.found)


def manifest(past: Planted, md5: str) -> list[dict[str, str]]:
    return list(json.loads((past.settings.root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]).read_text()))


def test_traces_in_git_in_dvcs_own_files_in_databases_and_in_names_are_found(past: Planted) -> None:
    root, home = past.settings.root, past.settings.home
    before = found(search(past.settings, past.store, TRACES))
    (root / "notes.md").write_text(f"what about {ERASED}?\n")
    planted.git(root, "add", "notes.md")
    planted.git(root, "stash")  # no branch and no working copy has it
    (root / "own.csv").write_text(f"id,why\n{ERASED},odd\n")
    (root / ".dvc" / "tmp" / "exps").mkdir(parents=True)
    (root / ".dvc" / "tmp" / "exps" / "rows.txt").write_text(ERASED)
    (root / "data" / f"{ERASED}.txt").write_text("")
    past.store.client.set_tag(past.other.run_id, "note", f"see {ERASED}")
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        database.execute("CREATE TABLE flow_run (parameters TEXT)")
        database.execute("INSERT INTO flow_run VALUES (?)", (json.dumps({"ids": [ERASED]}),))
    new = found(search(past.settings, past.store, TRACES)) - before
    assert {(place, path, what) for place, path, what in new if place != "git history"} == {
        ("working copy", "own.csv", "id"),
        ("DVC's own files", ".dvc/tmp/exps/rows.txt", "id"),
        ("data", f"data/{ERASED}.txt", "name"),
        ("MLflow database", ".retort/mlflow.db", "id"),
        ("Prefect database", ".retort/prefect/prefect.db", "id"),
    }
    assert [what for place, _, what in new if place == "git history"] == ["id"]


def test_what_cannot_be_opened_is_listed_with_the_reason(past: Planted) -> None:
    root = past.settings.root
    (root / "data" / "pool" / "part-00009.parquet").write_bytes(b"PAR1 and nothing more")
    (root / "data" / "gone.csv").symlink_to(root / "nowhere")
    config = root / ".dvc" / "config"
    config.write_text(config.read_text() + "['remote \"cloud\"']\n    url = http://127.0.0.1:9/nothing\n")
    unread = {(one.place, one.path): one.why for one in search(past.settings, past.store, TRACES).unread}
    assert set(unread) == {("data", "data/pool/part-00009.parquet"), ("data", "data/gone.csv"), ("DVC remote cloud", "")}
    assert all(unread.values())


def test_paths_that_are_left_out_are_not_looked_at(past: Planted) -> None:
    own = past.settings.home / "requests" / "r-held.parquet"
    assert "requests" in {one.place for one in search(past.settings, past.store, TRACES).found}
    assert "requests" not in {one.place for one in search(past.settings, past.store, TRACES, without=[own]).found}


def test_what_a_dead_search_left_is_removed(past: Planted) -> None:
    left = past.settings.home / ".looking-dead"
    left.mkdir()
    shutil.copy(past.settings.home / "requests" / "r-held.parquet", left)
    search(past.settings, past.store, TRACES)
    assert not list(past.settings.home.glob(".looking-*"))


@pytest.mark.parametrize(
    "text",
    [f"{ERASED}", f"a {ERASED}.", f'["{ERASED}"]', f"x/{ERASED}.png", f"\n{ERASED}\n", f"{ERASED}-1"],
)
def test_an_id_is_found_as_a_whole_word(text: str) -> None:
    assert Words([ERASED]).found(text.encode())


@pytest.mark.parametrize("text", [f"{ERASED}0", f"x{ERASED}", f"_{ERASED}", ERASED[:-1], "digits 0005", "digits-0004 digits-0006"])
def test_neighbours_are_no_alarm(text: str) -> None:
    assert not Words([ERASED]).found(text.encode())


def test_ids_that_are_words_or_numbers_are_left_to_columns(tmp_path: Path) -> None:
    words = Words(["cat", "7", "20261122", "d00012"])
    assert words.short == 3
    assert not words.found(b"the cat of 20261122 has 7 lives")
    assert words.found(b"row d00012")
    small = Looker(planted.Traces(frozenset({"7"}), frozenset()), set(), tmp_path)
    write_parquet(tmp_path / "a.parquet", pa.table({"sample_id": ["6", "7"]}))
    write_parquet(tmp_path / "b.parquet", pa.table({"sample_id": ["6", "77"], "caption": ["7 cats", "7"][:1] * 2}))
    assert small.look(tmp_path / "a.parquet").carries == {"id"}
    assert small.look(tmp_path / "b.parquet").carries == set()


def test_ids_are_found_as_json_and_html_write_them() -> None:
    odd = Words(["Müller & Söhne 7"])
    assert odd.found(json.dumps({"id": "Müller & Söhne 7"}).encode())
    assert odd.found("<td>Müller &amp; Söhne 7</td>".encode())
    assert odd.found("id: Müller & Söhne 7.".encode())
    assert not odd.found("Müller & Söhne 77".encode())


@pytest.mark.parametrize("at", range(-14, 3))
def test_an_id_at_the_edge_of_a_part_is_found_and_its_neighbour_is_not(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_look, "CHUNK", 256)
    monkeypatch.setattr(_look, "OVERLAP", 64)
    filler = b"- " * 400
    assert look(tmp_path / "a", filler[: 512 + at] + f" {ERASED} ".encode() + filler) == {"id"}
    assert look(tmp_path / "b", filler[: 512 + at] + f" {ERASED}9 ".encode() + filler) == set()
    assert look(tmp_path / "c", filler[: 512 + at] + f" x{ERASED} ".encode() + filler) == set()


def test_a_value_that_only_a_dictionary_still_holds_is_found(tmp_path: Path) -> None:
    kept = pa.DictionaryArray.from_arrays(pa.array([0, 0, 2], pa.int32()), pa.array([IDS[1], ERASED, IDS[3]]))
    pq.write_table(pa.table({"sample_id": kept}), tmp_path / "leak.parquet", write_statistics=False)
    assert ERASED not in pq.read_table(tmp_path / "leak.parquet")["sample_id"].to_pylist()
    assert looker(tmp_path).look(tmp_path / "leak.parquet").carries == {"id"}


def test_lists_other_columns_and_metadata_of_tables_are_read(tmp_path: Path) -> None:
    def carries(table: pa.Table) -> set[str]:
        pq.write_table(table, tmp_path / "a.parquet")
        return set(looker(tmp_path).look(tmp_path / "a.parquet").carries)

    assert carries(pa.table({"parents": [[IDS[1]], [IDS[2], ERASED]]})) == {"parent"}
    assert carries(pa.table({"near": [[[ERASED]], []]})) == {"id"}
    assert carries(pa.table({"value": [f"{ERASED!r} is no number"]})) == {"id"}
    assert carries(pa.table({"facts": [{"of": ERASED}]})) == {"id"}
    assert carries(pa.table({"picture": encode(PIXELS[4:6])})) == {"image"}
    assert carries(pa.table({"n": [1]}).replace_schema_metadata({"first": ERASED})) == {"id"}
    assert carries(pa.table({"sample_id": [f"{ERASED}-1"], "parents": [[f"{ERASED}0"]]})) == set()
    assert carries(pa.table({"picture": encode(PIXELS[6:]), "sample_id": IDS[6:]})) == set()


def test_pictures_are_known_by_their_pixels_in_whatever_they_lie(tmp_path: Path) -> None:
    from PIL import Image

    colour = tmp_path / "colour.png"
    Image.fromarray(PIXELS[5, 0]).convert("RGB").save(colour, compress_level=0)
    assert looker(tmp_path).look(colour).carries == {"image"}
    changed = PIXELS[5].copy()
    changed[0, 0, 0] ^= 1
    assert look(tmp_path / "near.png", encode(changed[None])[0]) == set()
    assert look(tmp_path / "a.pickle", pickle.dumps({"rows": encode(PIXELS[4:7])})) == {"image"}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows/1.png", encode(PIXELS[5:6])[0])
    assert looker(tmp_path).look(tmp_path / "a.zip").carries == {"image"}
    np.save(tmp_path / "a.npy", PIXELS)
    assert looker(tmp_path).look(tmp_path / "a.npy").carries == {"image"}
    np.save(tmp_path / "b.npy", np.delete(PIXELS, 5, axis=0))
    assert looker(tmp_path).look(tmp_path / "b.npy").carries == set()


def test_packed_texts_and_arrow_files_are_opened(tmp_path: Path) -> None:
    assert look(tmp_path / "a.log.gz", gzip.compress(f"row {ERASED}".encode())) == {"id"}
    np.savez(tmp_path / "a.npz", ids=np.array([IDS[1], ERASED]))
    assert looker(tmp_path).look(tmp_path / "a.npz").carries == {"id"}
    table = pa.table({"sample_id": IDS})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as out:
        out.write(table)
    assert looker(tmp_path).look(tmp_path / "a.arrow").carries == {"id"}
    with pytest.raises(Unreadable):
        look(tmp_path / "half.gz", gzip.compress(os.urandom(1000))[:500])


def test_an_unmistakable_id_is_found_in_the_free_pages_of_a_database(tmp_path: Path) -> None:
    name = "subject-2f0c-000017"
    one = Looker(planted.Traces(frozenset({name}), frozenset()), set(), tmp_path)
    for path, written in (("held.db", name), ("near.db", name + "8")):
        with sqlite3.connect(tmp_path / path) as database:
            database.execute("PRAGMA secure_delete = OFF")  # some systems switch it on
            database.execute("CREATE TABLE t (key TEXT, value TEXT)")
            database.execute("INSERT INTO t VALUES ('sample', ?)", (written,))
            database.commit()
            database.execute("DELETE FROM t")
        database.close()
    assert one.look(tmp_path / "held.db").carries == {"id"}
    assert one.look(tmp_path / "near.db").carries == set()
