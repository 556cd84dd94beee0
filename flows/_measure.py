"""Measuring claims: their seeds, what is published of them, and whether changed code still gives the same figures."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from flows import _claims
from tasks.core import catalog, files
from tasks.core.claim import Claim, Effect, Row, judge, table
from tasks.core.errors import UserError
from tasks.core.settings import shared_data

DIGITS = 6  # of what is published
TIMED = {"cost", "seconds", "ms"}  # words of metrics on which no two runs agree
LIBRARIES = ("torch", "numpy", "scikit-learn", "diffusers", "peft", "transformers")
Told = Callable[[str], None]


def folders(claim: Claim, data: Path | None = None) -> list[Path]:
    """The folders that a claim reads, `data` in the place of the first. Raises UserError where one is missing."""
    found = [shared_data() / name for name in claim.data]
    if data is not None:
        found[:1] = [data]
    absent = [folder for folder in found if not folder.is_dir()]
    if absent:
        raise UserError(f"the claim reads {absent[0]}, which is not there; name the folder of data sets in RETORT_DATA, or one with --data")
    return [folder.resolve() for folder in found]


def run(
    name: str,
    seeds: Sequence[int] | None = None,
    *,
    data: Path | None = None,
    off: bool = False,
    small: bool = False,
    jobs: int = 0,
    told: Told = lambda _: None,
) -> dict[str, Any]:
    """Measure a claim on these seeds (default: its own), each in a process of its own, and judge it.

    off    the method's idea switched off: the baseline's code in its place
    small  the smallest sizes: that it runs, not what it finds
    jobs   seeds at once; 0: one for each core
    Raises UserError for data that is not there, and where no seed could be measured.
    """
    claim: Claim = _claims.load(name).CLAIM
    seeds = list(range(claim.seeds)) if seeds is None else list(seeds)
    where = folders(claim, data)
    began = time.monotonic()
    measured: dict[int, list[Row]] = {}
    failures: dict[int, str] = {}
    for seed, rows, error in _each(name, seeds, where, off, small, jobs):
        measured[seed] = rows
        if error:
            failures[seed] = error
        told(f"{name} seed {seed}: {error or f'{len(rows)} values'} ({len(measured)}/{len(seeds)}, {time.monotonic() - began:.0f} s)")
    if len(failures) == len(seeds):
        raise UserError(f"no seed of the claim of {name} could be measured; the first said: {failures[seeds[0]]}")
    # what is published is judged: figures that anyone works out from the file are those in it
    exact = table({seed: measured[seed] for seed in seeds})
    values = {metric: {arm: [round(v, DIGITS) for v in column] for arm, column in arms.items()} for metric, arms in exact.items()}
    return result(name, claim, seeds, values, failures, where, time.monotonic() - began)


def _each(name: str, seeds: list[int], where: list[Path], off: bool, small: bool, jobs: int) -> Iterator[tuple[int, list[Row], str]]:
    jobs = min(jobs or os.cpu_count() or 1, len(seeds))
    if jobs == 1:
        yield from (_one(name, seed, where, off, small) for seed in seeds)
        return
    import multiprocessing

    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(_one, name, seed, where, off, small) for seed in seeds]
        yield from (done.result() for done in as_completed(waiting))


def _one(name: str, seed: int, where: list[Path], off: bool, small: bool) -> tuple[int, list[Row], str]:
    """One seed: its rows, and why there are none where training diverged or the data did not do."""
    module = _claims.load(name)
    method = module.switched_off if off else catalog.get(name).entry
    try:
        return seed, list(module.measure(method, seed, where, small)), ""
    except UserError as error:
        return seed, [], str(error)


def result(
    name: str,
    claim: Claim,
    seeds: Sequence[int],
    values: Mapping[str, Mapping[str, list[float]]],
    failures: Mapping[int, str],
    where: Sequence[Path],
    seconds: float,
) -> dict[str, Any]:
    """What is published of a claim, ready for JSON: numbers that are not finite are None."""
    status, effects = judge(claim, values)
    judged = [(condition, effects[condition.name]) for condition in claim.conditions]
    return {
        "method": name,
        "claim": claim.text,
        "status": status,
        **_figures(effects[claim.headline.name]),
        "headline": claim.headline.name,
        "conditions": {c.name: {**c.__dict__, **_figures(e), "status": e.status, "failed": len(e.failed)} for c, e in judged},
        "arms": {metric: {arm: _spread(column) for arm, column in arms.items()} for metric, arms in values.items()},
        "seeds": list(seeds),
        "values": {metric: {arm: [_finite(v) for v in column] for arm, column in arms.items()} for metric, arms in values.items()},
        "failures": {str(seed): reason for seed, reason in failures.items()},
        "data": {folder.name: files.folder_md5(folder) for folder in where},
        "code": _claims.digests(name),
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), **{library: importlib.metadata.version(library) for library in LIBRARIES}},
    }


def _figures(effect: Effect) -> dict[str, Any]:
    return {"effect": _finite(effect.mean), "ci_low": _finite(effect.low), "ci_high": _finite(effect.high)}


def _spread(column: Sequence[float]) -> dict[str, float | None]:
    known = [value for value in column if math.isfinite(value)]
    return {
        "mean": _finite(statistics.fmean(known)) if known else None,
        "sd": _finite(statistics.stdev(known)) if len(known) > 1 else None,
    }


def _finite(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None


def judged_again(found: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a result that follow from its values, worked out anew from them."""
    claim: Claim = _claims.load(found["method"]).CLAIM
    back = {m: {a: [math.nan if v is None else v for v in column] for a, column in arms.items()} for m, arms in found["values"].items()}
    fresh = result(found["method"], claim, found["seeds"], back, found["failures"], [], 0.0)
    return {key: fresh[key] for key in ("claim", "status", "effect", "ci_low", "ci_high", "headline", "conditions", "arms")}


def kept(name: str, *, told: Told = lambda _: None) -> dict[str, Any] | None:
    """The published result as that of the code as it is now, where its first seed gives the same figures again: then no change since has
    touched what is measured. None where it gives others, was measured on other data or seeds, or there is no result.

    Costs one seed instead of all. Metrics of time are not compared.
    """
    claim: Claim = _claims.load(name).CLAIM
    found = _claims.published(name)
    if found is None or found["seeds"] != list(range(claim.seeds)):
        return None
    if found["data"] != {folder.name: files.folder_md5(folder) for folder in folders(claim)}:
        return None
    seed = found["seeds"][0]
    try:
        again = run(name, [seed], jobs=1, told=told)
    except UserError:
        return None
    if (_of_first(again), again["failures"]) != (
        _of_first(found),
        {key: why for key, why in found["failures"].items() if key == str(seed)},
    ):
        return None
    return {**found, **judged_again(found), "code": again["code"]}


def _of_first(found: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    values = {metric: arms for metric, arms in found["values"].items() if TIMED.isdisjoint(metric.split())}
    return {metric: {arm: column[0] for arm, column in arms.items()} for metric, arms in values.items()}


def write(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a result and its figure into a folder."""
    from tasks.core.page_claims import figure

    paths = [folder / f"{found['method']}{end}" for end in (".json", ".svg")]
    files.write_text(paths[0], json.dumps(found, indent=1) + "\n")
    files.write_text(paths[1], figure(found, alone=True) + "\n")
    return paths
