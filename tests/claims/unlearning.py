"""The protocol that all claims of unlearning share: data, network, references, search and figures. A claim adds its arms and conditions.

    def measure(method, seed, data, small=False):
        found = []
        for scenario in ("class", "random"):
            case = unlearning.case(scenario, seed, data[0], small)
            steps = case.budget(0.1)
            found += unlearning.compare(case, {
                "finetune": (finetune.finetune, unlearning.grid(finetune.Config, RATES, "weight_decay", (5e-4, 5e-3), steps=steps)),
                "mine": (method, unlearning.grid(mine.Config, RATES, "gamma", (1e-3, 3e-3), steps=steps)),
            })
        return found

case     one scenario for one seed: its rows, the original network, the retrained one, the CPU seconds of retraining (see `Case`).
         class: every row of the first class is forgotten; random: 10% of the rows; noisy: 60% of the rows of the first half of the classes
         have a wrong label, drawn evenly from the others, the original learns them by heart, and they are forgotten, wrong labels and all.
grid     settings by name: every learning rate with every value of one further setting, and what is the same in all of them.
compare  every arm at each of its settings; the rows below. All arms must have the same number of settings: equal search.
nothing  an entry that gives the model back: `switched_off` of a claim whose baseline is doing nothing.

Rows, S the scenario, for each arm, and for `original` (doing nothing) and `retrain`:
  "S gap", "S ua", "S ra", "S ta", "S mia", "S zrf", "S relearn"  on test rows, at the setting with the smallest gap on the validation rows
  "S cost"           CPU seconds of the arm's entry, once, over those of retraining; the search is not counted in
  "S choice"         position of the chosen setting in its grid, from 0 on
  "S gap at NAME"    of every setting, on test rows: the curve (NaN: diverged)
  "S void"           of retrain: 1 where forgetting cannot be told from not forgetting

Equal    4,000 Fashion-MNIST rows drawn by the seed, 2,000 for validation, 4,000 of the official test rows, the same for all seeds; batches
         of 64, two convolutions of 32 and 64 channels and 256 features; 1,500 steps of training, with noisy labels 2,000: enough to fit all
         rows. The search takes the gap to the seed's own retrained network as known: too kind, to all arms alike.
Kept     networks and figures of entries below `tasks` stand in the folder `.cache`, by a digest of the code that makes them (less its
         docstrings), the rows, the settings and torch's version: claims share them, and whatever changes is made again.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch

from tasks.core import catalog, files, networks
from tasks.core.claim import Row
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import MethodConfig
from tasks.core.networks import Net
from tasks.evaluate import forgetting
from tasks.train import supervised
from tasks.unlearn import retrain
from tests.claims.samples import Images, dataset, images

Scenario = Literal["class", "random", "noisy"]
SCENARIOS: tuple[Scenario, ...] = ("class", "random", "noisy")
Entry = Callable[..., Net]
Arm = tuple[Entry, Mapping[str, MethodConfig]]  # an entry, and its settings by name
Values = dict[str, dict[str, float]]  # figures by role
C = TypeVar("C", bound=MethodConfig)
KEPT = Path(__file__).parent / ".cache"
FIGURES = ("avg_gap", "ua", "ra", "ta", "mia", "zrf", "relearn")
SHARE, NOISE = 0.1, 0.6  # of all rows; of the rows of the first half of the classes


class Sizes(NamedTuple):
    """Rows drawn, the network, steps of training (and with noisy labels), and rows on either side that fit the attack."""

    train: int = 4000
    validation: int = 2000
    test: int = 4000
    widths: tuple[int, ...] = (32, 64)
    hidden: int = 256
    steps: int = 1500
    noisy_steps: int = 2000
    attack: int = 1000


SMALL = Sizes(300, 100, 200, (4, 8), 16, 30, 30, 100)


@dataclass(frozen=True)
class Case:
    """One scenario for one seed.

    validation, test  rows never seen: to choose on, and for the figures
    seconds           CPU time of retraining
    steps             of training, for either network
    key               digest of all rows, which are forgotten, sizes and seed; empty: nothing is kept on disk
    """

    scenario: Scenario
    seed: int
    size: Sizes
    forget: Dataset
    retain: Dataset
    validation: Dataset
    test: Dataset
    original: Net
    retrain: Net
    seconds: float
    steps: int
    key: str

    def budget(self, share: float) -> int:
        """Steps that are this share of those of training."""
        return max(1, round(self.steps * share))

    def run(self, entry: Entry, cfg: MethodConfig) -> tuple[Net, float]:
        """What the entry makes of the original, and its CPU seconds."""
        return _timed(lambda: entry(self.original, self.forget, self.retain, cfg, seed=self.seed))


def case(scenario: Scenario, seed: int, data: Path, small: bool = False) -> Case:
    """The case of this seed; its networks come from the disk where they are kept. Raises UserError where the data has too few rows."""
    size = SMALL if small else Sizes()
    pool, official, rng = images(data, "train"), images(data, "test"), np.random.default_rng(seed)
    if len(pool.labels) < size.train + size.validation:
        raise UserError(f"{data} has {len(pool.labels)} training rows; this claim takes {size.train + size.validation}")
    at = rng.permutation(len(pool.labels))
    drawn = pool.take(at[: size.train])
    wrong = (drawn.labels < len(pool.classes) // 2) & (rng.random(size.train) < NOISE)
    moved = (drawn.labels + rng.integers(1, len(pool.classes), size.train)) % len(pool.classes)
    tenth = np.isin(np.arange(size.train), rng.permutation(size.train)[: round(size.train * SHARE)])
    gone = {"class": drawn.labels == 0, "random": tenth, "noisy": wrong}[scenario]
    if scenario == "noisy":
        drawn = drawn._replace(labels=np.where(wrong, moved, drawn.labels))
    validation = pool.take(at[size.train : size.train + size.validation])
    test = official.take(np.random.default_rng(0).permutation(len(official.labels))[: size.test])
    steps = size.noisy_steps if scenario == "noisy" else size.steps
    train = _rows(drawn, "t")
    forget, retain = train.where(gone), train.where(~gone)
    first = "" if small else _digest(_code(supervised.__name__), drawn.pixels, drawn.labels, size, steps, seed)
    fit = supervised.Config(steps=steps, widths=size.widths, hidden=size.hidden)
    original, _ = _kept_net(first, lambda: supervised.supervised(train, fit, seed=seed))
    key = "" if small else _digest(first, _code(retrain.__name__), gone, validation.pixels, test.pixels)
    again, seconds = _kept_net(key, lambda: retrain.retrain(original, forget, retain, retrain.Config(steps=steps), seed=seed))
    return Case(scenario, seed, size, forget, retain, _rows(validation, "v"), _rows(test, "e"), original, again, seconds, steps, key)


def grid(config: type[C], rates: Sequence[float], further: str = "", values: Sequence[Any] = (), **same: Any) -> dict[str, C]:
    """Settings by name: each learning rate, with each value of one further setting where one is named."""
    if not further:
        return {f"{lr:g}": config(**{"lr": lr, **same}) for lr in rates}
    return {f"{lr:g} {value:g}": config(**{"lr": lr, further: value, **same}) for lr in rates for value in values}


def compare(of: Case, arms: Mapping[str, Arm], prefix: str = "") -> list[Row]:
    """Rows of the references and of each arm, see above; `prefix` stands before the metrics, behind the scenario, as for another budget.

    With small sizes, each arm tries its first two settings only. Raises ValueError where the arms' numbers of settings differ, UserError
    where every setting of an arm diverged.
    """
    if len({len(settings) for _, settings in arms.values()}) > 1:
        raise ValueError(f"unequal search: { ({arm: len(settings) for arm, (_, settings) in arms.items()}) }")
    say = f"{of.scenario} {prefix}"
    known = reference(of)
    found = [Row(name, say + "cost", float(name == "retrain")) for name in ("original", "retrain")]
    found += [Row(name, say + metric.removeprefix("avg_"), known[name]["test"][metric]) for name in known for metric in FIGURES]
    found.append(Row("retrain", say + "void", known["retrain"]["test"]["void"]))
    for arm, (entry, settings) in arms.items():
        names = list(settings)[:2] if of.size == SMALL else list(settings)
        tried = trials(of, entry, [settings[name] for name in names])
        gaps = [values["validation"]["avg_gap"] for values in tried]
        if all(math.isnan(gap) for gap in gaps):
            raise UserError(f"every setting of {arm} diverged ({of.scenario}, seed {of.seed})")
        best = int(np.nanargmin(gaps))
        found += [Row(arm, say + metric.removeprefix("avg_"), tried[best]["test"][metric]) for metric in FIGURES]
        found += [Row(arm, say + "cost", tried[best]["cpu"]["seconds"] / of.seconds), Row(arm, say + "choice", best)]
        found += [Row(arm, f"{say}gap at {name}", values["test"]["avg_gap"]) for name, values in zip(names, tried, strict=True)]
    return found


def reference(of: Case) -> dict[str, Values]:
    """Figures by role of `original` and `retrain`, `void` among them."""
    return _kept(_of_figures(of, "references"), lambda: figures(of, {"original": of.original, "retrain": of.retrain}))  # type: ignore[no-any-return]


def trials(of: Case, entry: Entry, settings: Sequence[MethodConfig]) -> list[Values]:
    """Figures by role of an entry at each of the settings, and `["cpu"]["seconds"]`; NaN where training diverged."""
    known, ours = reference(of), entry.__module__.startswith("tasks.")
    code = _code(entry.__module__) if ours and of.key else ""
    keys = [_of_figures(of, code, entry.__name__, cfg.model_dump_json()) if code else "" for cfg in settings]
    nets: dict[str, Net] = {}
    seconds = {}
    for at, (key, cfg) in enumerate(zip(keys, settings, strict=True)):
        if _absent(key):
            try:
                nets[str(at)], seconds[str(at)] = of.run(entry, cfg)
            except UserError as error:
                if "diverged" not in str(error):
                    raise
    measured = figures(of, nets) if nets else {}  # all at once: the rows are read once
    for name, by_role in measured.items():
        for role, by in by_role.items():
            by["avg_gap"] = float(np.mean([abs(by[key] - known["retrain"][role][key]) for key in forgetting.GAP_OF]))
        by_role["cpu"] = {"seconds": seconds[name]}
    lost = {role: dict.fromkeys(FIGURES, math.nan) for role in ("validation", "test")} | {"cpu": {"seconds": math.nan}}
    return [_kept(key, partial(measured.get, str(at), lost)) for at, key in enumerate(keys)]


def figures(of: Case, nets: Mapping[str, Net]) -> dict[str, Values]:
    """Figures of networks by role: with the rows of `validation` and of `test` as those never seen."""
    kind: Literal["class", "samples"] = "class" if of.scenario == "class" else "samples"
    least = {"probe_rows": 0, "relearn_rows": 1, "relearn_steps": 1}  # the choice looks at the gap alone
    found: dict[str, Values] = {name: {} for name in nets}
    for role, rows in (("validation", of.validation), ("test", of.test)):
        cfg = forgetting.Config(scenario=kind, attack_rows=of.size.attack, **(least if rows is of.validation else {}))
        measured = forgetting.forgetting(nets, {"forget": of.forget, "retain": of.retain, "test": rows}, cfg, seed=of.seed).figures
        for name, by in measured.items():
            found[name][role] = {metric: figure.value for metric, figure in by.items()}
    return found


def nothing(model: Net, forget: Dataset, retain: Dataset, cfg: MethodConfig, *, seed: int = 0, device: str = "cpu") -> Net:
    """The model as it is: what every method must beat."""
    return copy.deepcopy(model)


def _rows(of: Images, prefix: str) -> Dataset:
    return dataset(of.pixels, of.labels, of.classes, prefix=prefix)


def _timed(make: Callable[[], Net]) -> tuple[Net, float]:
    began = time.process_time()
    net = make()
    return net, time.process_time() - began


def _digest(*parts: Any) -> str:
    total = hashlib.md5(torch.__version__.encode(), usedforsecurity=False)
    for part in parts:
        total.update((part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode()) + b"\0")
    return total.hexdigest()


@cache  # as it was when first asked for: a file may be edited while its old code still runs
def _code(module: str) -> str:
    """Digest of the code that the module runs on, without docstrings and comments. What reads data sets is left out: the rows are in."""
    reading = set(catalog.closure("tasks.core.dataset")) - set(catalog.closure("tasks.core.loop"))
    return _digest(*[_plain(path) for path in catalog.closure(module) if path not in reading])


def _plain(path: Path) -> str:
    """The syntax of a file, less docstrings and comments."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree)


def _of_figures(of: Case, *parts: str) -> str:
    return _digest(OWN, of.key, _code(forgetting.__name__), *parts) if of.key else ""


def _absent(key: str) -> bool:
    return not key or not (KEPT / f"{key}.json").is_file()


def _kept(key: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, as JSON has it: from the disk, or made and put there. Without a key it is made."""
    path = KEPT / f"{key}.json"
    if key and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    made = make()
    if key:
        KEPT.mkdir(exist_ok=True)
        files.write_text(path, json.dumps(made))
    return made


def _kept_net(key: str, make: Callable[[], Net]) -> tuple[Net, float]:
    """A network and the CPU seconds it took: from the disk, or made and put there. Without a key it is made."""
    path = KEPT / f"{key}.pt"
    if key and path.is_file():
        saved = torch.load(path, weights_only=True)
        net = networks.build(saved["arch"])
        net.load_state_dict(saved["weights"])
        return net.eval(), saved["seconds"]
    net, seconds = _timed(make)
    if key:
        KEPT.mkdir(exist_ok=True)
        whole = BytesIO()
        torch.save({"arch": net.arch, "weights": net.state_dict(), "seconds": seconds}, whole)
        files.write_bytes(path, whole.getvalue())
    return net, seconds


OWN = _plain(Path(__file__))
