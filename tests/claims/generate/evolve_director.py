"""Prompts that a director lets evolve against random ones and a uniform grid, at the same and at half the teacher's pictures.

Claim   With 80 calls of the teacher, evolving prompts teach a student more than random ones with 160: the paper's curated pictures do
        what many more do. Also at equal calls, by .05 with 80 and .02 with 160, and more than a uniform grid of words with 80.
        `score`: share of pictures of held-out prompts in which another network sees the class once the prompt's look is undone.
Arms    random (half)      160 (80) calls, all at the start, for prompts as they are given: 70% have the common look
        grid half          80 calls at the start, every word equally often
        evolve (half)      a quarter of the calls at the start, the rest as the director asks; what it does not ask for is not spent
        no delete half     the same without deletion
        `rare`: the score of uncommon looks alone; `look`: share of pictures with the look that was asked for.
Equal   Student's start, teacher, given prompts, held-out prompts (2 of 8 a class: no arm asks for them), 8 rounds of 25 batches of 16,
        and the judge, which is trained anew in each run. The evaluator is a support vector machine on rows that nobody else saw.
World   8x8 digits, fine or bold, plain, tilted, mirrored or waved: 80 prompts. The student starts from weights that know the common
        look alone, so prompts differ much in difficulty. The teacher went on from the same weights with all looks, equally often.
        Start, teacher and evaluator are the same for all seeds.
Tuned   On seeds 1000 to 1002. Inverted ink kept a teacher from learning the class (1900 steps: .13), and was left out. A lead in
        score of 0, .1 and .5 up to which the student is as good: .422, .340, .319 with 80 calls, the last with a doubled learning rate
        and three seeds instead of two (30 calls spent); random with 80 calls .338, and .337 with the doubled rate. Of two seeds: random
        with 160 calls .390, grid with 80 .416, with 160 .450, evolve with 160 .400. Conditions were set then.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset, decode
from tasks.core.denoise import denoise
from tasks.core.errors import UserError
from tasks.core.method import Made
from tasks.core.text_to_image import Diffuser, build, quiet
from tasks.generate import evolve_director
from tests.claims.samples import Images, dataset, images

CLAIM = Claim(
    text="prompts that evolve by a judge's verdicts teach a small generator more than random ones do with twice as many teacher's pictures",
    data=(),
    headline=Beats("evolve half", "random", "score"),
    also=(
        Beats("evolve half", "random half", "score", by=0.05),
        Beats("evolve", "random", "score", by=0.02),
        Beats("evolve half", "grid half", "score"),
    ),
)
Pixels = npt.NDArray[np.uint8]
Words = tuple[str, str]  # stroke and look
STROKES, LOOKS = ("fine", "bold"), ("plain", "tilted", "mirrored", "waved")
COMMON = 0.7  # share of the given prompts that have the first look; the others share the rest
SIDE, TEACHER, BASE, JUDGED = 8, 700, 500, 500  # pixels; rows that teach teacher and student's start, of base and shots, of the evaluator


class Sizes(NamedTuple):
    """Calls; batches of the student's start and of the teacher; renderings of a row; held-out prompts a class and pictures of each."""

    calls: tuple[int, int] = (80, 160)
    steps: tuple[int, int] = (400, 800)
    times: int = 4
    held: int = 2
    each: int = 8
    cfg: evolve_director.Config = evolve_director.Config(rounds=8, steps=25, batch=16, lr=2e-3, judge_steps=200)


TINY = evolve_director.Config(rounds=2, steps=2, batch=4, judge_steps=3, sampling_steps=2)
SMALL = Sizes((16, 16), (3, 3), 1, 1, 1, TINY)  # half of the calls is as many: switched off, the arms are then one and the same


def source(data: Sequence[Path]) -> Images:
    """All rows in a fixed random order, at most 8x8."""
    if data:
        rows = images(data[0], "train")
        sides = (min(SIDE, rows.pixels.shape[2]), min(SIDE, rows.pixels.shape[3]))
        rows = rows._replace(pixels=F.adaptive_avg_pool2d(torch.tensor(rows.pixels).float(), sides).round().to(torch.uint8).numpy())
    else:
        pixels, labels = load_digits(return_X_y=True)
        names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
        rows = Images((pixels / 16 * 255).round().astype(np.uint8).reshape(-1, 1, 8, 8), labels.astype(np.int64), names, {})
    if len(rows.labels) < TEACHER + BASE + JUDGED:
        raise UserError(f"this claim needs {TEACHER + BASE + JUDGED} training rows; there are {len(rows.labels)}")
    return rows.take(np.random.default_rng(0).permutation(len(rows.labels)))


def looked(image: Pixels, look: str, turn: int) -> Pixels:
    """An image (C, H, W) with a look (`turn` 1), or without the one it has (-1)."""
    if look == "tilted":
        return np.rot90(image, turn, axes=(1, 2))
    if look == "mirrored":
        return image[:, :, ::-1]
    if look == "waved":
        return np.stack([np.roll(image[:, at], turn * 2 * (at % 4 // 2), axis=-1) for at in range(image.shape[1])], 1)
    return image


def undone(pixels: Pixels, words: Sequence[Words]) -> Pixels:
    """Images (N, C, H, W) without the looks that they are to have."""
    return np.stack([looked(image, look, -1) for image, (_, look) in zip(pixels, words, strict=True)])


def rendered(rows: Images, seed: int, times: int, common: float) -> tuple[Images, list[Words]]:
    """Each row several times, with strokes and looks at random; `common`: share of the first look."""
    rng, more = np.random.default_rng(seed), rows.take(np.tile(np.arange(len(rows.labels)), times))
    n = len(more.labels)
    shares = [common, *[(1 - common) / (len(LOOKS) - 1)] * (len(LOOKS) - 1)]
    words = list(zip(rng.choice(STROKES, n).tolist(), rng.choice(LOOKS, n, p=shares).tolist(), strict=True))
    wide = np.maximum(more.pixels, np.pad(more.pixels, ((0, 0), (0, 0), (0, 0), (1, 0)))[..., :-1])
    bold = np.array([stroke == "bold" for stroke, _ in words])[:, None, None, None]
    inked = np.where(bold, wide, more.pixels)
    return more._replace(pixels=np.stack([looked(image, look, 1) for image, (_, look) in zip(inked, words, strict=True)])), words


def caption(words: Words, name: str) -> str:
    return f"{words[0]} {words[1]} {name}"


@cache
def models(data: tuple[Path, ...], size: Sizes) -> tuple[str, str]:
    """Folders of the student's start, which knows the common look alone, and of the teacher, which went on from it with all looks."""
    rows = source(data)
    found, words = rendered(rows.take(np.arange(TEACHER)), 1, size.times, 1 / len(LOOKS))
    prompts = [caption(said, found.classes[label]) for said, label in zip(words, found.labels, strict=True)]
    common = np.array([at for at, (_, look) in enumerate(words) if look == LOOKS[0]])
    folders = []
    with quiet(), loop.seeded(0) as generator:
        model = build(found.pixels.shape[1:], prompts, channels=16, prediction="v_prediction")
        for at, steps in zip((common, np.arange(len(prompts))), size.steps, strict=True):
            tokens, weights = model.tokens([prompts[i] for i in at]), [*model.unet.parameters(), *model.text.parameters()]
            how: dict[str, Any] = {"lr": 2e-3, "weight_decay": 0.0, "prompt_dropout": 0.1, "generator": generator, "what": "teacher"}
            denoise(model, found.pixels[at], tokens, weights, steps=steps, batch=16, **how)
            folders.append(saved(model))
    return folders[0], folders[1]


def saved(model: Diffuser) -> str:
    """A new folder with the model, gone when the process ends."""
    folder = tempfile.mkdtemp(prefix="retort-claim-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, part in (("unet", "unet"), ("text", "text_encoder"), ("tokenizer", "tokenizer"), ("scheduler", "scheduler")):
        getattr(model, name).save_pretrained(Path(folder, part))
    return folder


@cache
def evaluators(data: tuple[Path, ...], times: int) -> tuple[Any, Any]:
    """Support vector machines for the class, of pictures whose look is undone, and for the look, on rows that nobody else saw."""
    from sklearn.svm import SVC

    found, words = rendered(source(data).take(np.arange(TEACHER + BASE, TEACHER + BASE + JUDGED)), 2, times, 1 / len(LOOKS))
    n = len(words)
    own = SVC(C=10).fit(undone(found.pixels, words).reshape(n, -1) / 255, found.labels)
    return own, SVC(C=10).fit(found.pixels.reshape(n, -1) / 255, [look for _, look in words])


def measure(method: Callable[..., Made], seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """All arms for one seed: the given prompts, the held-out ones and all that is drawn are the seed's."""
    size, where, rng = SMALL if small else Sizes(), tuple(data), np.random.default_rng([seed, 1])
    rows = source(where)
    given, words = rendered(rows.take(TEACHER + rng.permutation(BASE)), seed, 1, COMMON)
    names = given.classes
    captions = [caption(said, names[label]) for said, label in zip(words, given.labels, strict=True)]
    combos = list(product(STROKES, LOOKS))
    held = {
        caption(combos[at], name): (label, combos[at])
        for label, name in enumerate(names)
        for at in rng.choice(len(combos), size.held, replace=False)
    }
    start, teacher = models(where, size)
    own: dict[str, Any] = {"pretrained": (teacher,), "student": start, "held_out": tuple(held), "drawn": tuple(held)}
    still: dict[str, Any] = {"start": 1.0, "judged": 0.0}
    half, whole = ({**own, "calls": calls} for calls in size.calls)
    arms: dict[str, dict[str, Any]] = {
        "random half": {**half, **still},
        "grid half": {**half, **still, "first": "grid"},
        "no delete half": {**half, "delete": False},
        "evolve half": half,
        "random": {**whole, **still},
        "evolve": whole,
    }
    shots, base = (
        dataset(given.pixels[at], given.labels[at], names, captions[at], prefix=prefix)
        for at, prefix in ((slice(100), "s"), (slice(100, None), "b"))
    )
    found = []
    for arm, settings in arms.items():
        made = method(shots, base, size.held * size.each, size.cfg.model_copy(update=settings), seed=seed)
        drawn = decode(made.rows["image"].combine_chunks().field("bytes").to_pylist(), given.pixels.shape[1:])
        told = [held[text] for text in made.rows["caption"].to_pylist()]
        found += [Row(arm, name, value) for name, value in scores(where, size, drawn, told).items()]
        found += [Row(arm, name.replace("_", " "), made.figures[name]) for name in ("calls", "pairs", "student_share")]
    return found


def scores(data: tuple[Path, ...], size: Sizes, drawn: Pixels, told: Sequence[tuple[int, Words]]) -> dict[str, float]:
    """Shares of pictures that show what their prompts say: the class once the look is undone, this for uncommon looks, and the look."""
    own, of_look = evaluators(data, size.times)
    words, n = [said for _, said in told], len(told)
    right = own.predict(undone(drawn, words).reshape(n, -1) / 255) == np.array([label for label, _ in told])
    looks = np.array([look for _, look in words])
    rare = looks != LOOKS[0]
    return {
        "score": float(right.mean()),
        "rare": float(right[rare].mean()) if rare.any() else 0.0,
        "look": float((of_look.predict(drawn.reshape(n, -1) / 255) == looks).mean()),
    }


def switched_off(shots: Dataset, base: Dataset, n: int, cfg: evolve_director.Config, *, seed: int = 0, device: str = "cpu") -> Made:
    """Every call is spent on the first prompts, and nothing is judged."""
    return evolve_director.evolve_director(shots, base, n, cfg.model_copy(update={"start": 1.0, "judged": 0.0}), seed=seed, device=device)
