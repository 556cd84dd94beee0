from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from tasks.core import erased, files, loop, networks
from tasks.core.dataset import Dataset, Writer
from tasks.core.erasure import certificate as core
from tasks.core.erasure.certificate import Check, keep, kept, known_key, names, public_key, read_key, recheck, sign, verify
from tasks.core.errors import UserError
from tasks.core.page_certificate import headline, render_certificate
from tasks.core.saga import GENESIS, Journal
from tasks.core.settings import Settings
from tasks.core.store import Store
from tests.pages import examples

REQUEST = examples.REQUEST


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "project")


def facts(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in examples.certificate(**changes).items() if name not in ("signature", "public_key")}


def said(checks: list[Check]) -> dict[str, bool | None]:
    assert len({check.what for check in checks}) == len(checks)
    return {check.what: check.ok for check in checks}


GOOD = {"its fields": True, "its signature": True, "its key": True}


# signature


def test_what_was_signed_is_good_whatever_the_form_of_its_text(settings: Settings) -> None:
    signed = sign(settings, facts(reason="Löschung \u200b\U0001f600"))
    assert {name: signed[name] for name in facts()} == facts(reason="Löschung \u200b\U0001f600")
    turned = dict(reversed(signed.items()))
    for text in (json.dumps(signed), json.dumps(turned, indent=3), json.dumps(signed, ensure_ascii=False).encode()):
        assert said(verify(text, known_key(settings))) == GOOD
    assert said(verify(signed, known_key(settings))) == GOOD
    assert sign(settings, signed) == signed


def test_one_that_was_signed_when_contents_were_called_images_is_good(settings: Settings) -> None:
    samples = {"images" if name == "contents" else name: value for name, value in facts()["samples"].items()}
    signed = sign(settings, facts(samples=samples))
    assert said(verify(signed, known_key(settings))) == GOOD
    assert "contents" not in signed["samples"]


def test_a_few_lines_without_this_project_check_it_too(settings: Settings) -> None:
    signed = sign(settings, facts())
    rest = {name: value for name, value in signed.items() if name != "signature"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    key = serialization.load_pem_public_key(public_key(settings).encode())
    assert isinstance(key, ed25519.Ed25519PublicKey)
    key.verify(base64.b64decode(signed["signature"]), text)
    assert signed["public_key"] == public_key(settings).splitlines()[1]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not isinstance(value, dict | list):
        yield path
    for name, item in items:
        yield from leaves(item, (*path, name))


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "f" + value[1:] if isinstance(value, str) and value and value[0] != "f" else "e"


def test_every_field_that_is_edited_is_noticed(settings: Settings) -> None:
    signed = sign(settings, facts())
    paths = list(leaves(signed))
    assert len(paths) > 80
    for path in paths:
        changed = copy.deepcopy(signed)
        spot = changed
        for name in path[:-1]:
            spot = spot[name]
        spot[path[-1]] = other(spot[path[-1]])
        assert said(verify(changed, known_key(settings)))["its signature"] is False, path
    for name in signed:
        checks = verify({key: value for key, value in signed.items() if key != name}, known_key(settings))
        assert said(checks)["its signature"] is False, name
        assert said(checks)["its fields"] is (name in ("signature", "public_key")), name
    assert said(verify({**signed, "more": 1}, known_key(settings)))["its signature"] is False


def test_a_missing_field_is_named_and_no_value_is_repeated(settings: Settings) -> None:
    broken = sign(settings, facts())
    del broken["journal"], broken["search"]["found"]
    broken["request"] = "r-subject-17"
    found = verify(broken)[0]
    assert found.ok is False
    assert found.why == "not as it must be: request; missing: search.found, journal"


def test_what_another_key_signed_is_whole_but_not_this_projects(settings: Settings, tmp_path: Path) -> None:
    forged = sign(Settings(tmp_path / "other"), facts(reason="none"))
    public_key(settings)
    assert said(verify(forged, known_key(settings))) == {**GOOD, "its key": False}
    assert said(verify(forged)) == {**GOOD, "its key": None}
    real = sign(settings, facts())
    assert said(verify({**real, "public_key": forged["public_key"]}, known_key(settings))) == {
        **GOOD,
        "its signature": False,
        "its key": False,
    }


@given(st.data())
def test_a_part_of_a_certificate_is_none(data: st.DataObject) -> None:
    text = json.dumps(examples.certificate()).encode()
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(UserError, match="is no certificate"):
        verify(text[:cut])


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", '{"found": 1, "found": 0}', '{"a": NaN}', "[" * 100_000, b"\xff\xfe\x00", '{"a": %s}' % ("9" * 5000), "<html></html>"],
    ids=["empty", "list", "number", "twice", "nan", "deep", "bytes", "long", "page"],
)
def test_what_is_no_certificate_gets_a_sentence(text: str | bytes) -> None:
    with pytest.raises(UserError, match="is no certificate"):
        verify(text)


@pytest.mark.parametrize(
    "change",
    [
        {"reason": "\ud800"},
        {"signature": 3},
        {"signature": "é"},
        {"public_key": None},
        {"public_key": "AAAA"},
        {"samples": []},
        {"models": [None]},
        {"samples": {"count": 1, "salt": "00" * 65, "ids": [], "contents": []}},
    ],
    ids=str,
)
def test_damaged_values_fail_and_do_not_crash(settings: Settings, change: dict[str, Any]) -> None:
    checks = said(verify(json.dumps({**sign(settings, facts()), **change}), known_key(settings)))
    assert checks["its signature"] is False


def test_a_figure_that_is_no_number_becomes_null(settings: Settings) -> None:
    models = [{**facts()["models"][0], "figures": {"ua": 1.5, "avg_gap": float("nan")}}]
    signed = sign(settings, facts(models=models))
    assert signed["models"][0]["figures"] == {"ua": 1.5, "avg_gap": None}
    assert said(verify(json.dumps(signed, allow_nan=False), known_key(settings))) == GOOD


def test_facts_that_lack_something_are_not_signed(settings: Settings) -> None:
    short = facts()
    del short["purged"]
    with pytest.raises(ValueError, match="missing: purged"):
        sign(settings, short)
    with pytest.raises(ValueError, match=r"not as it must be: samples\.ids\.0"):
        sign(settings, facts(samples={"count": 1, "salt": "", "ids": ["d00017"], "contents": []}))


# keys


def test_the_private_key_is_the_owners_alone_and_stays(settings: Settings) -> None:
    assert known_key(settings) is None
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: public_key(settings), range(16)))
    path = settings.home / "signing.key"
    assert len(keys) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert isinstance(serialization.load_pem_private_key(path.read_bytes(), None), ed25519.Ed25519PrivateKey)
    assert path.read_text().startswith("-----BEGIN PRIVATE KEY-----\n")
    assert [p.name for p in settings.home.iterdir() if "new" in p.name] == []


def test_nothing_that_is_handed_out_holds_the_private_key(settings: Settings) -> None:
    signed = sign(settings, facts())
    path = keep(settings, signed)
    stored = (settings.home / "signing.key").read_text()
    private = serialization.load_pem_private_key(stored.encode(), None)
    assert isinstance(private, ed25519.Ed25519PrivateKey)
    raw = private.private_bytes_raw()
    forms = [stored.splitlines()[1], base64.b64encode(raw).decode().rstrip("="), raw.hex()]
    handed_out = [
        json.dumps(signed),
        path.with_suffix(".html").read_text(),
        path.read_text(),
        public_key(settings),
        str(known_key(settings)),
    ]
    assert not [text for text in handed_out for form in forms if form in text]


def pem(key: Any, secret: bytes = b"") -> bytes:
    how = serialization.BestAvailableEncryption(secret) if secret else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def test_a_key_of_the_users_own_signs_instead(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "own.pem").write_bytes(pem(key))
    monkeypatch.setenv("RETORT_SIGNING_KEY", str(tmp_path / "own.pem"))
    signed = sign(settings, facts())
    (tmp_path / "public.pem").write_text(public_key(settings))
    assert said(verify(signed, read_key(tmp_path / "public.pem"))) == GOOD
    assert not (settings.home / "signing.key").exists()


def test_a_key_that_cannot_sign_gets_a_sentence_without_its_content(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.pem"
    monkeypatch.setenv("RETORT_SIGNING_KEY", str(path))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        known_key(settings)
    good = ed25519.Ed25519PrivateKey.generate()
    public = good.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    cases = {
        "of another kind than ed25519": pem(rsa.generate_private_key(65537, 2048)),
        "has a passphrase": pem(good, b"secret"),
        "no private key in PEM": pem(good)[:60],
        "no private key": public,
    }
    for sentence, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=sentence) as caught:
            sign(settings, facts())
        assert content.decode().splitlines()[1][:16] not in str(caught.value)


def test_a_public_key_is_read_as_pem_and_as_its_line(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "key"
    for text in (public_key(settings), f"{known_key(settings)}\n", f"the key of our project\n{public_key(settings)}"):
        path.write_text(text)
        assert read_key(path) == known_key(settings)
    path.write_bytes((settings.home / "signing.key").read_bytes())
    with pytest.raises(UserError, match="private key, which nobody should hand out"):
        read_key(path)
    for content in (b"", b"no key", b"\xff" * 40):
        path.write_bytes(content)
        with pytest.raises(UserError, match="holds no public key"):
            read_key(path)


# keeping and showing


def test_certificates_are_kept_with_their_pages_the_oldest_first(settings: Settings) -> None:
    assert kept(settings) == []
    late, early = "r-" + "0" * 16, "r-" + "f" * 16
    signed = [sign(settings, facts(request=late)), sign(settings, facts(request=early, finished_at="2026-10-29T23:00:00-05:00"))]
    paths = [keep(settings, one) for one in signed]
    assert [one["request"] for one in kept(settings)] == [early, late]
    assert all(said(verify(one, known_key(settings))) == GOOD for one in kept(settings))
    assert paths == [settings.home / "certificates" / f"{name}.json" for name in (late, early)]
    assert all("Certificate of deletion" in path.with_suffix(".html").read_text() for path in paths)
    paths[0].write_text("{")
    assert [one["request"] for one in kept(settings)] == [early]


def test_the_page_says_what_became_of_it(settings: Settings) -> None:
    shown = render_certificate(examples.certificate(reason="<script>alert(1)</script>"))
    assert "<script>" not in shown
    assert "12 samples were deleted" in shown
    assert "found nothing of them" in shown
    done, waiting, hard, empty = (
        headline(core.Facts.model_validate(one))
        for one in (
            examples.certificate(),
            examples.waiting_certificate(),
            examples.hard_certificate(),
            examples.empty_certificate(),
        )
    )
    assert done[1].startswith("12 samples were taken out of 3 data folders; 2 models that had learned from them were taken out of use;")
    assert waiting[0] == "12 samples were deleted from the data; 1 model still waits"
    assert hard[0] == "The deletion is not complete: something was still found"
    assert "1 remain" in hard[1]
    assert empty[1].startswith("No data folder held the 0 samples")


def test_the_page_shows_some_hashes_and_counts_the_rest() -> None:
    shown = render_certificate(examples.hard_certificate())
    assert "And 2,500 more in the file." in shown
    assert f"{499:032x}" in shown
    assert f"{500:032x}" not in shown


# the facts once more


class Place:
    """A project with a pool, from which four rows were erased, and what its certificate says of that."""

    def __init__(self, root: Path, tiny: Dataset) -> None:
        self.settings = Settings(root)
        self.before = pq.read_table(sorted(tiny.parts[0].folder.glob("part-*.parquet")))
        self.rows = tiny.take(np.array([0, 7, 199, 399]))
        self.info = tiny.info
        self.write("pool", self.before.filter(~np.isin(np.array(tiny.ids()), self.rows.ids())))
        self.add(erased.traces_of(self.rows))
        Journal(self.settings.home / "journal.jsonl").append("erased", request=REQUEST)

    def add(self, traces: erased.Traces) -> None:
        erased.add(self.settings.root / erased.FOLDER, traces, REQUEST)

    def write(self, name: str, rows: pa.Table) -> None:
        with Writer(self.settings.root / "data" / name, self.info) as out:
            out.write(rows)

    def certificate(self, **changes: Any) -> dict[str, Any]:
        listed = erased.Erased.read(self.settings.root / erased.FOLDER)
        hashes = [sorted(value.hex() for value in some) for some in (listed.ids, listed.contents)]
        samples = {"count": len(self.rows), "salt": listed.salt.hex(), "ids": hashes[0], "contents": hashes[1]}
        journal = Journal(self.settings.home / "journal.jsonl").entries()[-1]["hash"]
        own = {"samples": samples, "models": [], "irreproducible": [], "journal": journal, "data": facts()["data"][:1]}
        return sign(self.settings, facts(**{**own, **changes}))

    def look(self, certificate: dict[str, Any]) -> dict[str, bool | None]:
        return said(recheck(self.settings, None, certificate))


@pytest.fixture
def place(tmp_path: Path, tiny: Dataset) -> Place:
    return Place(tmp_path / "project", tiny)


def test_the_subject_can_look_for_a_sample_with_the_salt_alone(place: Place) -> None:
    found = json.loads(json.dumps(place.certificate()))
    salt = bytes.fromhex(found["samples"]["salt"])
    hashed = {name: hashlib.blake2b(name.encode(), key=salt, digest_size=16).hexdigest() for name in ("d00007", "d00008")}
    assert {name: value in found["samples"]["ids"] for name, value in hashed.items()} == {"d00007": True, "d00008": False}
    assert [names(found, name) for name in ("d00007", "d00008")] == [True, False]
    assert "d00007" not in json.dumps(found)


def test_what_was_erased_and_stays_so_is_good(place: Place) -> None:
    assert place.look(place.certificate()) == {"rows of data/pool": True, "suppression list": True, "journal": True}


def test_a_sample_that_comes_back_is_seen_by_id_by_parent_and_by_content(place: Place) -> None:
    certificate, clean = place.certificate(), pq.read_table(place.settings.root / "data" / "pool" / "part-00000.parquet")
    lost = place.before.filter(np.isin(place.before["sample_id"].to_pylist(), ["d00399"]))
    spare = clean.slice(5, 1)

    def with_column(rows: pa.Table, name: str, value: Any) -> pa.Table:
        at = rows.schema.names.index(name)
        return rows.set_column(at, rows.schema.field(name), pa.array([value], rows.schema.field(name).type))

    ways = {
        "id": with_column(lost, "image", spare["image"][0].as_py()),
        "parent": with_column(with_column(spare, "sample_id", "g1"), "parents", ["d00001", "d00399"]),
        "content": with_column(lost, "sample_id", "fresh-id"),
    }
    for way, row in ways.items():
        for folder in ("pool", "generated"):
            place.write(folder, pa.concat_tables([clean, row]))
            checks = recheck(place.settings, None, certificate)
            found = next(check for check in checks if check.what == f"rows of data/{folder}")
            assert found == Check(f"rows of data/{folder}", False, "1 of them carry the samples"), way
            place.write(folder, clean)
            assert place.look(certificate)[f"rows of data/{folder}"] is True


def test_a_sample_in_quarantine_or_among_verdicts_is_seen_too(place: Place) -> None:
    certificate, pool = place.certificate(), place.settings.root / "data" / "pool"
    pq.write_table(pa.table({"column": ["sample_id"], "value": ["d00000"]}), pool / "quarantine.parquet")
    assert place.look(certificate)["rows of data/pool"] is False
    (pool / "quarantine.parquet").unlink()
    judged = place.settings.root / "data" / "filtered"
    judged.mkdir()
    (judged / "dataset.json").write_text((pool / "dataset.json").read_text())
    pq.write_table(pa.table({"sample_id": ["d00001", "d00199"], "kept": [True, True]}), judged / "part-00000.parquet")
    assert place.look(certificate)["rows of data/filtered"] is False


def test_rows_that_cannot_be_read_are_not_taken_to_be_clean(place: Place) -> None:
    certificate, pool = place.certificate(), place.settings.root / "data" / "pool"
    shard = pool / "part-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert place.look(certificate)["rows of data/pool"] is None
    shutil.rmtree(pool)
    assert place.look(certificate)["rows of data/pool"] is None


def test_a_suppression_list_that_lost_something_is_seen(place: Place) -> None:
    certificate = place.certificate()
    path = place.settings.root / erased.FOLDER / erased.LIST
    whole = pq.read_table(path)
    pq.write_table(whole.slice(1), path)
    found = next(check for check in recheck(place.settings, None, certificate) if check.what == "suppression list")
    assert (found.ok, found.why) == (False, "1 of 8 traces are not on it")
    pq.write_table(whole.replace_schema_metadata({"salt": "00" * 16}), path)  # then only numbers can be compared
    assert place.look(certificate)["suppression list"] is True
    pq.write_table(whole.slice(1).replace_schema_metadata({"salt": "00" * 16}), path)
    assert place.look(certificate)["suppression list"] is None
    path.write_bytes(b"")
    assert place.look(certificate)["suppression list"] is False
    path.unlink()
    assert place.look(certificate)["suppression list"] is False


def test_a_certificate_without_samples_has_nothing_to_look_for(place: Place) -> None:
    nothing = {"count": 0, "salt": "", "ids": [], "contents": []}
    assert place.look(place.certificate(samples=nothing)) == {"rows of data/pool": None, "suppression list": None, "journal": True}


def test_a_journal_that_was_changed_or_is_another_is_seen(place: Place) -> None:
    certificate = place.certificate()
    path = place.settings.home / "journal.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace("erased", "erasee"))
    assert place.look(certificate)["journal"] is False
    path.unlink()
    assert place.look(certificate)["journal"] is False
    assert place.look(place_with_first(place))["journal"] is None
    Journal(path).append("promoted", name="m", version=1)
    assert place.look(certificate)["journal"] is False


def place_with_first(place: Place) -> dict[str, Any]:
    """A certificate that followed no entry."""
    return sign(place.settings, {**examples.certificate(models=[], irreproducible=[]), "journal": GENESIS})


def test_a_folder_outside_the_project_is_not_looked_at(place: Place) -> None:
    data = [{"path": "../../elsewhere", "before": None, "after": None, "rows": 0}]
    assert "rows of ../../elsewhere" not in place.look(place.certificate(data=data))


def test_fields_that_are_missing_leave_nothing_to_look_at(place: Place) -> None:
    with pytest.raises(UserError, match="missing: journal"):
        recheck(place.settings, None, {name: value for name, value in place.certificate().items() if name != "journal"})


# DVC


def store_version(place: Place, store: Path) -> str:
    """Put the pool, as it was before, into a DVC store, as `dvc add` and `dvc push` do."""
    old = place.settings.root / "old"
    with Writer(old, place.info) as out:
        out.write(place.before)
    entries = [{"md5": files.file_md5(p), "relpath": p.name} for p in sorted(old.iterdir())]
    listed = json.dumps(entries, sort_keys=True).encode()
    version = files.folder_md5(old)
    assert version == hashlib.md5(listed).hexdigest() + ".dir"
    for entry, path in zip(entries, sorted(old.iterdir()), strict=True):
        target = store / "files" / "md5" / entry["md5"][:2] / entry["md5"][2:]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    manifest = store / "files" / "md5" / version[:2] / version[2:]
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_bytes(listed)
    shutil.rmtree(old)
    return version


@pytest.fixture
def dvc(place: Place, tmp_path: Path) -> tuple[Place, str, Path]:
    """The project under DVC, with a remote that can be reached and one that cannot; the version that is gone; the remote's folder."""
    remote = tmp_path / "remote"
    version = store_version(place, remote)
    shutil.rmtree(remote)
    remote.mkdir()
    (place.settings.root / ".dvc").mkdir()
    remotes = f"['remote \"far\"']\n url = {remote}\n['remote \"lost\"']\n url = {tmp_path / 'unmounted'}\n"
    (place.settings.root / ".dvc" / "config").write_text(f"[core]\n no_scm = true\n analytics = false\n{remotes}")
    return place, version, remote


def test_a_data_version_that_is_gone_is_gone_from_cache_and_remotes(dvc: tuple[Place, str, Path]) -> None:
    place, version, _ = dvc
    checks = recheck(place.settings, None, place.certificate(irreproducible=[version]))
    found = next(check for check in checks if check.what.startswith("data version"))
    assert (found.ok, found.why) == (True, "it cannot be had from the project's own copies, the DVC cache, the remote far")
    assert said(checks)["old data versions in the remote lost"] is None


@pytest.mark.parametrize("where", ["cache", "remote", "both"])
def test_a_data_version_that_is_back_is_seen(dvc: tuple[Place, str, Path], where: str) -> None:
    place, version, remote = dvc
    certificate, cache = place.certificate(irreproducible=[version]), place.settings.root / ".dvc" / "cache"
    store_version(place, remote if where == "remote" else cache)
    if where == "both":  # each has a part, and together they have it all
        shard = max((path for path in cache.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        moved = remote / shard.relative_to(cache)
        moved.parent.mkdir(parents=True)
        shard.rename(moved)
    checks = recheck(place.settings, None, certificate)
    found = next(check for check in checks if check.what.startswith("data version"))
    place_said = "the remote far" if where == "remote" else "the DVC cache"
    assert (found.ok, found.why) == (False, f"it can be had again from {place_said}")


def test_a_list_of_files_without_the_files_brings_no_version_back(dvc: tuple[Place, str, Path]) -> None:
    place, version, remote = dvc
    store_version(place, remote)
    max((path for path in remote.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size).unlink()
    assert place.look(place.certificate(irreproducible=[version]))[f"data version {version[:12]}"] is True
    (place.settings.cache / "versions" / version).mkdir(parents=True)
    assert place.look(place.certificate(irreproducible=[version]))[f"data version {version[:12]}"] is False


def test_without_dvc_old_versions_cannot_be_seen(place: Place) -> None:
    assert place.look(place.certificate(irreproducible=["0" * 32 + ".dir"]))["old data versions"] is None


# the registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, tiny: Dataset) -> tuple[Place, Store]:
    """A project with two versions of a model, of which the first was revoked and replaced."""
    before = dict(os.environ)
    place = Place(tmp_path_factory.mktemp("registry") / "project", tiny)
    store = Store(place.settings)
    refs = []
    for seed in (1, 2):
        run = store.start(f"k{seed}", "train", params={}, tags={"retort.role": "teacher", "retort.method": "train.supervised"}, inputs=[])
        with loop.seeded(seed):
            net = networks.convnet((1, 8, 8), 10, widths=(2,), hidden=4, mean=0.5, std=0.5)
        refs.append(store.log_net(run, net, name="teacher", classes=tiny.info.classes, tags={}))
        store.finish(run, f"k{seed}", {}, {})
        assert store.register("m", refs[-1], {}) == seed
    inputs = json.dumps({"models": {"candidate": {"kind": "ModelRef", **refs[1].model_dump()}}})
    run = store.start("e", "evidence", params={}, tags={"retort.role": "gate evidence", "retort.inputs": inputs}, inputs=[])
    figures = {"candidate": {"accuracy": {"value": 0.9, "low": 0.8, "high": 0.95}}}
    store.log_json(run, "evidence.json", {"figures": figures, "data": {}, "details": {}})
    store.finish(run, "e", {}, {})
    store.tag("m", 1, "revoked", REQUEST)
    store.set_alias("m", "champion", 2)
    weights_of(place, refs[0].model_id).unlink()
    model = {**facts()["models"][0], "name": "m", "version": 1, "replaced_by": 2, "sha256": refs[0].sha256}
    place.signed = place.certificate(models=[model])  # type: ignore[attr-defined]
    place.refs = refs  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update(before)
    return place, store


def weights_of(place: Place, model_id: str) -> Path:
    (found,) = place.settings.artifacts.rglob(f"models/{model_id}/artifacts/artifacts/weights.safetensors")
    return found


def looked(registry: tuple[Place, Store]) -> dict[str, bool | None]:
    place, store = registry
    checks = said(recheck(place.settings, store, place.signed))  # type: ignore[attr-defined]
    return {what: ok for what, ok in checks.items() if " m version " in f" {what}"}


CLEAN = {"m version 1": True, "service of m version 1": True, "weights of m version 1": True, "evidence on m version 2": True}


def test_a_version_that_was_revoked_and_replaced_stays_so(registry: tuple[Place, Store]) -> None:
    assert looked(registry) == CLEAN


def test_a_version_that_is_no_longer_revoked_is_seen(registry: tuple[Place, Store]) -> None:
    _, store = registry
    store.tag("m", 1, "revoked", "false")
    assert looked(registry) == {**CLEAN, "m version 1": False}
    store.tag("m", 1, "revoked", REQUEST)
    assert looked(registry) == CLEAN


@pytest.mark.parametrize("alias", ["champion", "candidate"])
def test_a_version_that_is_back_in_service_is_seen(registry: tuple[Place, Store], alias: str) -> None:
    _, store = registry
    store.set_alias("m", alias, 1)
    assert looked(registry) == {**CLEAN, "service of m version 1": False}
    store.delete_alias("m", alias)
    assert looked(registry) == CLEAN


def test_weights_that_are_back_are_seen_wherever_they_lie(registry: tuple[Place, Store], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    place, _ = registry
    first, second = place.refs  # type: ignore[attr-defined]
    with loop.seeded(1):
        net = networks.convnet((1, 8, 8), 10, widths=(2,), hidden=4, mean=0.5, std=0.5)
    save_file({key: value.detach().contiguous() for key, value in net.state_dict().items()}, tmp_path / "w.safetensors")
    home = weights_of(place, second.model_id).parents[3] / first.model_id / "artifacts" / "artifacts" / "weights.safetensors"
    assert hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest() == first.sha256
    for target in (home, place.settings.cache / "elsewhere" / "any-name.safetensors"):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "w.safetensors", target)
        assert looked(registry) == {**CLEAN, "weights of m version 1": False}
        target.unlink()
    home.write_bytes(b"other weights in their place")
    assert looked(registry) == {**CLEAN, "weights of m version 1": False}
    home.unlink()
    assert looked(registry) == CLEAN


def test_the_same_weights_under_another_name_are_seen(registry: tuple[Place, Store]) -> None:
    place, store = registry
    assert store.register("copied", place.refs[0], {}) == 1  # type: ignore[attr-defined]
    found = said(recheck(place.settings, store, place.signed))  # type: ignore[attr-defined]
    assert found["copies of m version 1"] is False
    store.set_alias("copied", "champion", 1)
    assert looked(registry)["service of m version 1"] is False
    store.client.delete_registered_model("copied")
    assert looked(registry) == CLEAN


def test_evidence_that_is_gone_is_missed(registry: tuple[Place, Store]) -> None:
    place, _ = registry
    (file,) = place.settings.artifacts.rglob("evidence.json")
    text = file.read_text()
    file.unlink()
    assert looked(registry) == {**CLEAN, "evidence on m version 2": False}
    file.write_text(text)
    assert looked(registry) == CLEAN


def test_other_weights_under_the_same_number_are_seen_in_the_signers_own_registry(registry: tuple[Place, Store], tmp_path: Path) -> None:
    place, store = registry
    signed = copy.deepcopy(place.signed)  # type: ignore[attr-defined]
    signed["models"][0]["sha256"] = "0" * 64
    again = sign(place.settings, signed)
    assert said(recheck(place.settings, store, again))["m version 1"] is False
    elsewhere = sign(Settings(tmp_path / "other"), signed)
    assert said(recheck(place.settings, store, elsewhere))["m version 1"] is None


def test_without_a_registry_the_models_cannot_be_seen(registry: tuple[Place, Store]) -> None:
    place, _ = registry
    found = said(recheck(place.settings, None, place.signed))  # type: ignore[attr-defined]
    assert {what: ok for what, ok in found.items() if "m version" in what} == {
        "m version 1": None,
        "weights of m version 1": None,
        "evidence on m version 2": None,
    }


def test_a_model_that_waits_is_neither_good_nor_bad(registry: tuple[Place, Store]) -> None:
    place, store = registry
    signed = copy.deepcopy(place.signed)  # type: ignore[attr-defined]
    signed["models"][0].update(action="waiting", replaced_by=None)
    found = said(recheck(place.settings, store, sign(place.settings, signed)))
    assert {what: ok for what, ok in found.items() if "m version" in what} == {"m version 1": None}


def test_a_model_that_is_only_marked_as_deleted_is_not_taken_to_be_gone(registry: tuple[Place, Store], tmp_path: Path) -> None:
    """The last of these tests: what MLflow marks as deleted stays so."""
    place, store = registry
    first, second = place.refs  # type: ignore[attr-defined]
    store.client.delete_logged_model(first.model_id)
    assert looked(registry) == CLEAN
    home = weights_of(place, second.model_id).parents[3] / first.model_id / "artifacts" / "artifacts" / "weights.safetensors"
    home.write_bytes(b"in their place")
    assert looked(registry) == {**CLEAN, "weights of m version 1": False}
    home.unlink()
