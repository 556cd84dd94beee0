"""Measure diffusion models: what a judge takes their images for, and how far these are from real ones.

Paper   Score Forgetting Distillation (2025), arXiv 2409.11219: its unlearning accuracy by a judge; otherwise a baseline
Idea    each model draws as many images of each class. A classifier that was trained on real rows, forgotten classes among them, says
        what they are: for the classes that stay, the share that is judged right; for those that a model forgot, the share that is not
        (UA). A Frechet distance holds the drawn images of the classes that stay against the test rows.
Small   the Frechet distance is of pixels, brought down to 8x8, where the papers take features of Inception, trained on photographs.
Limits  A judge errs: its own accuracy on the test rows stands beside. UA alone cannot rank methods: a model that was never shown a class
        draws something else for it, too. Fewer images than a few hundred make the Frechet distance large by themselves. Digits of 8x8
        pixels (5 seeds, test): a diffusion model has .196 and 97.8% judged right, one trained a tenth as long 1.16 and 78.2%; the judge
        knows 98.5% of the test rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from tasks.core import loop, metrics
from tasks.core.dataset import Dataset
from tasks.core.denoise import pixel_frechet
from tasks.core.denoiser import Denoiser
from tasks.core.errors import UserError
from tasks.core.evidence import Evidence
from tasks.core.method import MethodConfig, method
from tasks.core.metrics import Figure
from tasks.core.networks import Net
from tasks.core.progress import track
from tasks.evaluate._shared import labelled

TAKES = "any"
JUDGE = "judge"


class Config(MethodConfig):
    """Settings."""

    each: int = Field(100, ge=2, description="images drawn of each class")


SMOKE = Config(each=2)


@method(
    paper="Score Forgetting Distillation: A Swift, Data-Free Method for Machine Unlearning in Diffusion Models (2025): its figures",
    arxiv="2409.11219",
    claim="the judged share and the Frechet distance tell a generator that was trained from one trained a tenth as long",
)
def generation(
    models: Mapping[str, Net], data: Mapping[str, Dataset], cfg: Config = Config(), *, seed: int = 0, device: str = "cpu"
) -> Evidence:
    """Figures of each diffusion model: `class_accuracy` and `worst_class_accuracy` over the classes of the rows `test`, `frechet`, `calls`
    of the network for an image, and where there are rows `forget`, `ua` (percent) of their classes, which the others then leave out. Of
    the classifier `judge`: its `accuracy`.

    Raises UserError where there is no judge, no diffusion model, no labelled test row, or one does not fit.
    """
    judge, drawing = split(models)
    (test,) = labelled({JUDGE: judge}, data, "test")
    gone = np.unique(data["forget"].labels()) if "forget" in data else np.array([], dtype=np.int64)
    gone = gone[gone >= 0]
    stay = np.setdiff1d(np.unique(test.labels), gone)
    if len(stay) == 0:
        raise UserError("the test rows have no class that is not forgotten: there is nothing to hold the drawn images against")
    real = test.where(np.isin(test.labels, stay))
    figures: dict[str, dict[str, Figure]] = {JUDGE: {"accuracy": metrics.share(judged(judge, test.inputs, device) == test.labels)}}
    details: dict[str, Any] = {"classes": list(data["test"].info.classes), "judged": {}}
    for name, net in zip(drawing, track(list(drawing.values()), "draw"), strict=True):
        if tuple(net.arch["shape"]) != tuple(judge.arch["shape"]) or net.arch["classes"] != judge.arch["classes"]:
            raise UserError(
                f"model {name!r} draws images {tuple(net.arch['shape'])} of {net.arch['classes']} classes; the judge does not fit"
            )
        asked = np.repeat([*stay, *gone], cfg.each).astype(np.int64)
        images = drawn(net, asked, seed, device)
        said = judged(judge, images, device)
        kept = np.isin(asked, stay)
        shares = [metrics.share(said[asked == label] == label) for label in stay]
        figures[name] = {
            "class_accuracy": metrics.share(said[kept] == asked[kept]),
            "worst_class_accuracy": min(shares, key=lambda figure: figure.value),
            "frechet": Figure.exact(pixel_frechet(images[kept], real.inputs)),
            "calls": Figure.exact(calls(net)),
        }
        if len(gone):
            figures[name]["ua"] = percent(metrics.share(said[~kept] != asked[~kept]))
        details["judged"][name] = metrics.confusion(asked, said, judge.arch["classes"]).tolist()
    return Evidence(figures, {role: rows.md5 for role, rows in data.items()}, details)


def split(models: Mapping[str, Net]) -> tuple[Net, dict[str, Denoiser]]:
    """The judge, and the diffusion models by name. Raises UserError where either is missing, or another is no diffusion model."""
    if JUDGE not in models or isinstance(models[JUDGE], Denoiser):
        raise UserError("the images need a judge: a classifier of the same classes, such as the teacher")
    drawing: dict[str, Denoiser] = {}
    for name, net in models.items():
        if name == JUDGE:
            continue
        if not isinstance(net, Denoiser):
            raise UserError(f"model {name!r} is a classifier: it draws nothing that could be judged")
        drawing[name] = net
    if not drawing:
        raise UserError("there is nothing to evaluate: no diffusion model was given")
    return models[JUDGE], drawing


def drawn(net: Denoiser, labels: npt.NDArray[np.int64], seed: int, device: str = "cpu") -> npt.NDArray[np.uint8]:
    """One image (C, H, W) of each label (N,); every model starts from the same noise."""
    there = loop.on(net, device)
    generator = torch.Generator().manual_seed(seed)
    images: npt.NDArray[np.uint8] = there.draw(torch.from_numpy(labels), generator=generator).numpy()
    return images


def judged(judge: Net, images: npt.NDArray[np.uint8], device: str = "cpu") -> npt.NDArray[np.int64]:
    """The class (N,) that the judge takes each image (N, C, H, W) for."""
    said: npt.NDArray[np.int64] = loop.predict(judge, images, device=device).argmax(1).numpy()
    return said


def calls(net: Denoiser) -> float:
    """Calls of the network for one image."""
    return 1.0 if net.arch.get("one_step") is not None else float(net.arch.get("draw_steps") or net.arch["levels"])


def percent(figure: Figure) -> Figure:
    """A share and its interval, in percent."""
    return Figure(100 * figure.value, 100 * figure.low, 100 * figure.high)
