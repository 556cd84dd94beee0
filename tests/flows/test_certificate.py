"""`retort certificate` as a user runs it: in the project, in a clone without it, and on a machine that has nothing but the file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.core import erased, files
from tasks.core.dataset import Dataset
from tasks.core.erasure.certificate import keep, place, sign
from tasks.core.saga import GENESIS
from tasks.core.settings import Settings
from tasks.core.store import Store
from tests import workspace
from tests.pages import examples
from tests.workspace import retort

pytestmark = pytest.mark.timeout(400)
REQUEST = examples.REQUEST


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that has run nothing, with one certificate: of samples that nobody had."""
    folder = workspace.make(tmp_path_factory.mktemp("small") / "project", workspace.smoke_params())
    settings = Settings(folder)
    keep(settings, sign(settings, {**examples.empty_certificate(), "journal": GENESIS}))
    return folder


def outcome(ran: subprocess.CompletedProcess[str]) -> dict[str, bool | None]:
    """The checks of `--json`, and `good` among them."""
    found = json.loads(ran.stdout)
    return {check["what"]: check["ok"] for check in found["checks"]} | {"good": found["good"]}


def elsewhere(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder that belongs to no project, as where only the package is installed."""
    env = {**workspace.environment(), "PYTHONPATH": str(Path(workspace.__file__).parents[1])}
    command = [sys.executable, "-m", "flows.cli", "certificate", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_the_public_key_is_printed_and_nothing_prints_the_private_one(small: Path) -> None:
    told = retort(small, "certificate", "key")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("-----BEGIN PUBLIC KEY-----\n")
    assert told.stdout.endswith("-----END PUBLIC KEY-----\n")
    file = str(place(Settings(small), REQUEST))
    said = [told, *(retort(small, "certificate", *words) for words in (["verify", file], ["list"], ["list", "--json"], ["show", REQUEST]))]
    secret = (small / ".retort" / "signing.key").read_text().splitlines()[1]
    assert not [ran for ran in said if secret[-40:] in ran.stdout + ran.stderr or "PRIVATE" in ran.stdout + ran.stderr]


def test_certificates_are_listed_and_shown(small: Path) -> None:
    listed = retort(small, "certificate", "list")
    assert listed.returncode == 0, listed.stderr
    assert "Certificates: 1" in listed.stdout
    assert REQUEST in listed.stdout
    assert [one["request"] for one in json.loads(retort(small, "certificate", "list", "--json").stdout)] == [REQUEST]
    page = Path(retort(small, "certificate", "show", REQUEST).stdout.strip())
    assert "Certificate of deletion" in page.read_text()
    page.unlink()
    assert Path(retort(small, "certificate", "show", REQUEST).stdout.strip()) == page
    assert page.exists()
    for unknown in ("r-0000000000000000", "../journal", ""):
        ran = retort(small, "certificate", "show", unknown)
        assert ran.returncode == 2
        assert f"there are: {REQUEST}" in ran.stderr


def test_a_damaged_certificate_is_listed_as_such(small: Path, tmp_path: Path) -> None:
    bad = place(Settings(small), "r-0000000000000000")
    bad.write_text("{")
    try:
        listed = retort(small, "certificate", "list")
    finally:
        bad.unlink()
    assert listed.returncode == 0
    assert f"{bad} cannot be read" in listed.stdout.replace("\n", "")


def test_without_a_project_the_signature_is_checked_and_it_is_said_that_nothing_else_was(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "certificate.json"
    shutil.copy(place(Settings(small), REQUEST), file)
    alone = elsewhere(tmp_path, "verify", str(file), "--json")
    assert alone.returncode == 0, alone.stderr
    assert outcome(alone) == {"good": True, "its fields": True, "its signature": True, "its key": None, "its facts": None}
    shown = elsewhere(tmp_path, "verify", str(file))
    assert "this is not inside a Retort project" in " ".join(shown.stdout.replace("│", " ").split())
    assert "good, 2 could not be made from here" in shown.stdout
    (tmp_path / "key.pem").write_text(retort(small, "certificate", "key").stdout)
    with_key = elsewhere(tmp_path, "verify", str(file), "--key", "key.pem", "--json")
    assert outcome(with_key) == {"good": True, "its fields": True, "its signature": True, "its key": True, "its facts": None}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["certificate.json", "key.pem"]


def test_an_edited_certificate_and_one_of_another_key_end_with_1(small: Path, tmp_path: Path) -> None:
    text = place(Settings(small), REQUEST).read_text()
    edited = tmp_path / "edited.json"
    edited.write_text(text.replace('"found": 0', '"found": 1'))
    ran = elsewhere(tmp_path, "verify", str(edited))
    assert ran.returncode == 1
    assert "it was changed after it was signed" in ran.stdout
    forged = tmp_path / "forged.json"
    forged.write_text(json.dumps(sign(Settings(tmp_path / "other"), json.loads(text))))
    ran = retort(small, "certificate", "verify", str(forged), "--json")
    assert ran.returncode == 1
    assert outcome(ran) == {"good": False, "its fields": True, "its signature": True, "its key": False, "its facts": None}


def test_bad_input_ends_with_2_and_a_sentence(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "part.json"
    file.write_bytes(place(Settings(small), REQUEST).read_bytes()[:300])
    (tmp_path / "no.key").write_text("no key")
    whole = str(place(Settings(small), REQUEST))
    cases: dict[str, tuple[str, ...]] = {
        "is no certificate, or only a part of one": ("verify", str(file)),
        "cannot be read: No such file": ("verify", str(tmp_path / "gone.json")),
        "cannot be read: Is a directory": ("verify", str(tmp_path)),
        "holds no public key": ("verify", whole, "--key", str(tmp_path / "no.key")),
        "is not inside a Retort project": ("list",),
    }
    for sentence, words in cases.items():
        ran = elsewhere(tmp_path, *words)
        assert ran.returncode == 2, ran.stdout + ran.stderr
        assert sentence in ran.stderr
        assert "Traceback" not in ran.stderr


def test_to_look_at_a_certificate_makes_nothing_in_the_project(small: Path) -> None:
    before = sorted(path for path in small.rglob("*") if "__pycache__" not in path.parts and ".dvc" not in path.parts)
    ran = retort(small, "certificate", "verify", str(place(Settings(small), REQUEST)), "--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert outcome(ran)["good"] is True
    assert sorted(path for path in small.rglob("*") if "__pycache__" not in path.parts and ".dvc" not in path.parts) == before


def test_a_finished_project_is_looked_at_again_and_whatever_comes_back_turns_it_red(copy: Path) -> None:
    settings = Settings(copy)
    facts = deleted(settings)
    file = keep(settings, sign(settings, facts))
    teacher = "digits-teacher version 1"
    old = f"data version {facts['irreproducible'][0][:12]}"

    def look() -> tuple[int, dict[str, bool | None]]:
        ran = retort(copy, "certificate", "verify", str(file), "--json")
        assert ran.stdout, ran.stderr
        return ran.returncode, outcome(ran)

    clean = {"its fields": True, "its signature": True, "its key": True, "good": True}
    clean |= {f"rows of data/{name}": True for name in ("pool", "filtered", "condensed", "generated")}
    clean |= {"suppression list": True, "journal": True, old: True}
    clean |= {teacher: True, f"service of {teacher}": True, f"weights of {teacher}": True, "evidence on digits-teacher version 2": True}
    assert look() == (0, clean)

    # the weights reappear, the version is un-revoked and back in service, and so is the old data
    store, hidden = Store(settings), settings.root / "hidden"
    hidden.rename(weights(settings, store))
    store.tag("digits-teacher", 1, "revoked", "false")
    store.set_alias("digits-teacher", "champion", 1)
    (settings.cache / "versions" / facts["irreproducible"][0]).mkdir(parents=True)
    (copy / erased.FOLDER / erased.LIST).unlink()
    code, found = look()
    red = {teacher, f"service of {teacher}", f"weights of {teacher}", old, "suppression list"}
    assert code == 1
    assert {what for what, ok in found.items() if ok is False} == red | {"good"}


def weights(settings: Settings, store: Store) -> Path:
    place = store.client.get_logged_model(store.version_ref("digits-teacher", 1).model_id).artifact_location
    assert place.startswith(settings.artifacts.as_uri())
    return Path(place.removeprefix("file://"), "artifacts", "weights.safetensors")


def deleted(settings: Settings) -> dict[str, Any]:
    """Let version 1 of the teacher, and samples that are not among the rows, be what a request took; give the facts of that."""
    store = Store(settings)
    rows = Dataset.open(settings.root / "data" / "pool").take(np.arange(3))
    pixels = {erased.image_digest(255 - image) for image in rows.images()}
    erased.add(settings.root / erased.FOLDER, erased.Traces(frozenset({"gone-1", "gone-2", "gone-3"}), frozenset(pixels)), REQUEST)
    listed = erased.Erased.read(settings.root / erased.FOLDER)
    store.tag("digits-teacher", 1, "revoked", REQUEST)
    for alias, version in store.aliases("digits-teacher").items():
        if version == 1:
            store.delete_alias("digits-teacher", alias)
    ref = store.version_ref("digits-teacher", 1)
    weights(settings, store).rename(settings.root / "hidden")
    model = {**examples.certificate()["models"][0], "version": 1, "replaced_by": 2, "sha256": ref.sha256}
    ids, contents = (sorted(value.hex() for value in some) for some in (listed.ids, listed.contents))
    pool = files.folder_md5(settings.root / "data" / "pool")
    return examples.certificate(
        samples={"count": 3, "salt": listed.salt.hex(), "ids": ids, "contents": contents},
        data=[{"path": "data/pool", "before": pool, "after": pool, "rows": 3}],
        models=[model],
        irreproducible=["0123456789abcdef" * 2 + ".dir"],
        journal=GENESIS,
    )
