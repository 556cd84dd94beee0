"""Unlearn: make a model forget the samples of a request, beside the references that show how well it did.

Consumes  a model out of the registry, the data it was trained on, and the ids of a request
Produces  the unlearned model, registered as the next version; a retrained and, of a classifier, a fine-tuned reference, logged but not
          registered
Started   by `retort run`, `retort unlearn`, or a deletion request
"""

from __future__ import annotations

from dataclasses import dataclass

from prefect import flow

from flows._registry import find_model, model_name, register, run_of
from flows._runs import one_at_a_time, shown
from flows._session import GENERATOR, session, step
from flows._types import Class, Folders, Model, Request
from flows.train import DATA, REAL
from tasks.core.errors import UserError
from tasks.core.refs import DataRef, ModelRef, data_ref, open_data, write_request
from tasks.core.step import Done, Inputs, Plan

DEMONSTRATION = "demonstration"


@dataclass(frozen=True)
class Unlearned:
    """The steps of one request: the unlearned model first, then the references; and the data that they used."""

    request: str
    original: ModelRef
    chosen: Done
    references: dict[str, Done]
    forget: tuple[DataRef, ...]
    retain: tuple[DataRef, ...]


@flow(name="unlearn")
def unlearn(request: Request = DEMONSTRATION, model: Model = "", data: Folders = (), class_name: Class = "") -> Unlearned:
    """Unlearn with the method that params.yaml names; `retrain` and `finetune` run beside it as references.

    request     id of a stored request, or `demonstration`: some training rows drawn by the seed
    model       `NAME@alias` or `NAME/version`; none: the newest version of the project's teacher that was trained
    data        the folders that the model was trained on; none: those that its kind is trained on
    class_name  all rows of this class instead of a request
    """
    here = session()
    original = find_model(model) if model else newest_trained()
    generator = here.store.role(original) == GENERATOR
    if here.store.reads(original):
        raise UserError("models of texts are not unlearned, but trained again without the rows: 'retort forget' does it")
    name = model_name(GENERATOR if generator else "teacher")
    method, settings = here.generator()[1] if generator else here.method("unlearn")
    if not method:
        raise UserError(f"{here.settings.params}: 'generator.unlearn' must name the method that makes {model} forget, such as sfd")
    draw = settings.pop("demonstration_rows", 10)
    if not isinstance(draw, int) or draw < 1:
        raise UserError(f"{here.settings.params}: 'unlearn.demonstration_rows' must be a whole number of 1 or more, not {draw!r}")
    whole = tuple(data_ref(here.settings, spec) for spec in data or (REAL if generator else DATA))
    if class_name:
        request = _of_class(whole, class_name)
    elif request == DEMONSTRATION:
        request = _draw(whole, draw, here.seed)
    forget = tuple(ref.model_copy(update={"only": request}) for ref in whole)
    retain = tuple(ref.model_copy(update={"without": request}) for ref in whole)
    inputs: Inputs = {"model": original, "forget": forget, "retain": retain}
    extra = {"retort.request": request}

    def do(role: str, name: str, given: dict[str, object]) -> Done:
        done = step(Plan(role, name, given, inputs, here.seed, extra))
        here.record("unlearn", name, done.cached, done.seconds, f"{done.seconds:.1f} s in the method", run_of(done))
        return done

    with one_at_a_time(here, name), shown(here, 2 if generator else 3):
        chosen = do("unlearned", method, settings)
        if generator:
            train, how = here.generator()[0]
            references = {"retrain": step(Plan("retrained", train, how, {"data": retain}, here.seed, extra))}
        else:
            references = {
                "retrain": do("retrained", "unlearn.retrain", here.params("recipe")),
                "finetune": do("finetuned", "unlearn.finetune", dict(here.params("references").get("finetune") or {})),
            }
        register(name, chosen)
    return Unlearned(request, original, chosen, references, forget, retain)


def _of_class(refs: tuple[DataRef, ...], name: str) -> str:
    """A request for all rows of a class. Raises UserError where there is no such class, or no row of it."""
    here = session()
    data = open_data(here.settings, *refs)
    if name not in data.info.classes:
        raise UserError(f"there is no class {name!r}; there are: {', '.join(data.info.classes)}")
    rows = data.where(data.labels() == data.info.classes.index(name))
    if len(rows) == 0:
        raise UserError(f"class {name!r} has no row in {', '.join(ref.path for ref in refs)}")
    return write_request(here.settings, rows.ids())


def _draw(refs: tuple[DataRef, ...], rows: int, seed: int) -> str:
    """A request for some labelled original rows, drawn by the seed."""
    import numpy as np

    here = session()
    data = open_data(here.settings, *refs)
    originals = np.flatnonzero(~data.synthetic() & (data.labels() >= 0))
    if len(originals) <= rows:
        raise UserError(f"a demonstration request of {rows} rows needs more labelled originals than the {len(originals)} there are")
    chosen = np.random.default_rng(seed).choice(originals, rows, replace=False)
    return write_request(here.settings, data.take(chosen).ids())


def newest_trained() -> ModelRef:
    """The newest teacher that was trained, and not unlearned; else the newest of them."""
    here = session()
    name = model_name("teacher")
    known = [found for found in here.store.versions(name) if found.tags.get("revoked", "false") == "false"]
    trained = [version for version in known if version.tags.get("retort.role") == "teacher"]
    return find_model(f"{name}/{trained[-1].version}") if trained else find_model(name)


if __name__ == "__main__":
    from flows.cli import run_alone

    run_alone(unlearn)
