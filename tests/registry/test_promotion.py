"""Moving the champion in a real registry: checks, faults at each step, crashes, rollback, and an alias that was moved past the gate."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlparse

import pytest

from flows import _promotion
from flows import promote as promotion
from flows._session import Session, use
from tasks.core import loop, networks
from tasks.core.errors import UserError
from tasks.core.saga import Journal
from tasks.core.settings import Settings
from tasks.core.store import Store, environment


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A registry of its own."""
    root = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", "params.yaml"):
        (root / name).touch()
    before = dict(os.environ)
    os.environ.update(environment(Settings(root)))
    yield Store(Settings(root))
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def name(store: Store, request: pytest.FixtureRequest) -> str:
    """A registered model with three versions, none of them champion, and an empty journal."""
    _promotion.journal_of(store.settings).path.unlink(missing_ok=True)
    model = "m-" + str(abs(hash(request.node.nodeid)))
    for seed in range(3):
        run = store.start(f"{model}-{seed}", "train", params={}, tags={}, inputs=[])
        with loop.seeded(seed):
            net = networks.convnet((1, 8, 8), 3, widths=(2,), hidden=4, mean=0.5, std=0.5)
        ref = store.log_net(run, net, name="net", classes=("a", "b", "c"), tags={})
        store.finish(run, f"{model}-{seed}", {}, {})
        store.register(model, ref, {})
    return model


def promote(store: Store, name: str, version: int, before: int | None) -> None:
    _promotion.move(store.settings, store, name, version, before, "promoting", f"reason {version}")


def kinds(store: Store, name: str) -> list[str]:
    return [entry["kind"] for entry in _promotion.history(store.settings, name)]


def champion(store: Store, name: str) -> int | None:
    return store.aliases(name).get("champion")


def break_weights(store: Store, name: str, version: int) -> None:
    ref = store.version_ref(name, version)
    place = Path(urlparse(store.client.get_logged_model(ref.model_id).artifact_location).path)
    shutil.rmtree(place / "artifacts")


def test_a_move_is_written_down_before_and_after(store: Store, name: str) -> None:
    promote(store, name, 1, None)
    assert champion(store, name) == 1
    entries = _promotion.history(store.settings, name)
    assert [(entry["kind"], entry["version"], entry["champion"]) for entry in entries] == [("promoting", 1, None), ("promoted", 1, None)]
    assert entries[-1]["reason"] == "reason 1"
    _promotion.check(store.settings, store, name)


def test_where_the_champion_changed_meanwhile_nothing_is_moved(store: Store, name: str) -> None:
    promote(store, name, 1, None)
    with pytest.raises(UserError, match="changed while version 3 was judged; run the promotion again"):
        promote(store, name, 3, 2)
    assert champion(store, name) == 1
    assert kinds(store, name) == ["promoting", "promoted"]


def test_a_version_that_cannot_be_served_gives_the_alias_back(store: Store, name: str) -> None:
    promote(store, name, 1, None)
    break_weights(store, name, 2)
    with pytest.raises(UserError, match=f"version 2 of {name} was not promoted: it cannot be served"):
        promote(store, name, 2, 1)
    assert champion(store, name) == 1
    assert kinds(store, name)[-2:] == ["promoting", "undone"]
    _promotion.check(store.settings, store, name)


def test_a_first_champion_that_cannot_be_served_leaves_none(store: Store, name: str) -> None:
    break_weights(store, name, 1)
    with pytest.raises(UserError, match="cannot be served"):
        promote(store, name, 1, None)
    assert champion(store, name) is None


@pytest.mark.parametrize("at", ["before the alias", "after the alias"])
def test_a_crash_in_a_move_is_finished_or_given_up_at_the_next_start(store: Store, name: str, at: str, monkeypatch) -> None:
    promote(store, name, 1, None)
    with monkeypatch.context() as broken:
        if at == "before the alias":
            broken.setattr(Store, "set_alias", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            broken.setattr(_promotion, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            promote(store, name, 2, 1)
    assert kinds(store, name)[-1] == "promoting"
    _promotion.check(store.settings, store, name)  # a move that was cut off is nobody's forgery
    assert _promotion.settle(store.settings, store) == []
    if at == "before the alias":
        assert (champion(store, name), kinds(store, name)[-1]) == (1, "abandoned")
    else:
        assert (champion(store, name), kinds(store, name)[-1]) == (2, "promoted")
    _promotion.check(store.settings, store, name)
    assert _promotion.settle(store.settings, store) == []


def test_a_crash_before_the_check_of_a_broken_version_is_undone_at_the_next_start(store: Store, name: str, monkeypatch) -> None:
    promote(store, name, 1, None)
    break_weights(store, name, 2)
    with monkeypatch.context() as broken:
        broken.setattr(_promotion, "finish", lambda *_: None)
        promote(store, name, 2, 1)
    assert champion(store, name) == 2
    [sentence] = _promotion.settle(store.settings, store)
    assert "was not promoted" in sentence
    assert champion(store, name) == 1


def test_an_alias_moved_past_the_gate_is_seen_and_put_back(store: Store, name: str) -> None:
    promote(store, name, 1, None)
    store.client.set_registered_model_alias(name, "champion", "3")
    with pytest.raises(UserError, match=f"version 3 by its alias, but 1 by the journal.*retort rollback {name}"):
        _promotion.check(store.settings, store, name)
    assert _promotion.rollback(store.settings, store, name, "") == 1
    _promotion.check(store.settings, store, name)


def test_rollback_goes_to_the_last_good_champion_and_passes_over_revoked_ones(store: Store, name: str) -> None:
    for version, before in ((1, None), (2, 1), (3, 2)):
        promote(store, name, version, before)
    store.client.set_model_version_tag(name, "2", "revoked", "true")
    assert _promotion.rollback(store.settings, store, name, "too slow") == 1
    assert champion(store, name) == 1
    assert _promotion.history(store.settings, name)[-1]["reason"] == "too slow"
    assert kinds(store, name)[-2:] == ["rolling-back", "rolled-back"]
    _promotion.check(store.settings, store, name)


def test_one_rollback_after_another_goes_further_back_and_never_to_what_was_left(store: Store, name: str) -> None:
    for version, before in ((1, None), (2, 1), (3, 2)):
        promote(store, name, version, before)
    assert _promotion.rollback(store.settings, store, name, "") == 2
    assert _promotion.rollback(store.settings, store, name, "") == 1
    with pytest.raises(UserError, match="no earlier champion"):
        _promotion.rollback(store.settings, store, name, "")
    promote(store, name, 3, 1)
    assert _promotion.rollback(store.settings, store, name, "") == 1


def test_with_nothing_to_go_back_to_rollback_says_so(store: Store, name: str) -> None:
    promote(store, name, 1, None)
    with pytest.raises(UserError, match="no earlier champion to go back to"):
        _promotion.rollback(store.settings, store, name, "")
    with pytest.raises(UserError, match="there is no registered model 'nobody'"):
        _promotion.rollback(store.settings, store, "nobody", "")
    assert champion(store, name) == 1


def test_a_version_that_answers_with_no_probabilities_is_refused(store: Store, name: str, monkeypatch) -> None:
    import mlflow

    real = mlflow.pyfunc.load_model

    def bent(uri: str) -> object:
        model = real(uri)
        monkeypatch.setattr(model, "predict", lambda images: [[float("nan")] * 3] * 2)
        return model

    monkeypatch.setattr(mlflow.pyfunc, "load_model", bent)
    with pytest.raises(UserError, match="no class probabilities"):
        promote(store, name, 1, None)


def test_whatever_fails_at_whatever_step_the_champion_is_the_rightful_one(store: Store, name: str, monkeypatch) -> None:
    """A hundred promotions with their verdicts, a fault at a random step of most, before or after it took effect: never none where there
    was one, never one that the journal does not name, never one without its verdict."""
    rng = random.Random(0)
    run = store.start(f"{name}-evidence", "evidence", params={}, tags={}, inputs=[])
    store.log_json(run, "evidence.json", {"figures": {"candidate": {}}, "data": {}, "details": {}})
    store.finish(run, f"{name}-evidence", {}, {})
    monkeypatch.setattr(promotion, "describe", lambda *_: None)  # the model card comes after all that is tested here
    basis = {"evidence": run, "also": [], "gate": "registry.gate", "settings": {}, "against": None, "apart": "", "mode": "off"}

    def failing(real: Callable[..., object], after: bool) -> Callable[..., object]:
        def step(*arguments: object, **named: object) -> object:
            if after:
                real(*arguments, **named)
            raise ConnectionError("the registry is down")

        return step

    of_store = ("log_json", "log_text", "tag", "set_alias", "smoke_check", "aliases", "artifact")
    faults = [*((Store, step) for step in of_store), (Journal, "append"), (Journal, "entries")]
    broke = moved = 0
    with use(Session(store.settings, direct=True, _store=store)):
        promotion.decide.fn(name, 1, None, basis)
        for _ in range(100):
            before = champion(store, name)
            version = rng.choice([v for v in (1, 2, 3) if v != before])
            with monkeypatch.context() as patch:
                if rng.random() < 0.8:
                    owner, step = rng.choice(faults)
                    patch.setattr(owner, step, failing(getattr(owner, step), rng.random() < 0.5))
                try:
                    promotion.decide.fn(name, version, before, basis)
                except ConnectionError:
                    broke += 1
            stands = champion(store, name)
            assert stands in (before, version)
            assert "retort.verdict" in store.version(name, stands).tags
            _promotion.settle(store.settings, store)
            _promotion.check(store.settings, store, name)
            assert champion(store, name) == _promotion.rightful(store.settings, name)
            assert kinds(store, name)[-1] not in _promotion.OPEN
            moved += champion(store, name) == version
    assert broke > 60
    assert moved > 20
