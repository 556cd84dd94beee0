"""Who makes pictures and who compares them: teachers behind a purse that counts every call, and judges that see two pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.core import clip, loop, networks
from tasks.core.denoise import denoise, draw
from tasks.core.progress import track
from tasks.core.text_to_image import Diffuser, build
from tasks.generate._director import Written
from tasks.generate._prompts import Vocabulary

Images = npt.NDArray[np.uint8]
Score = Callable[[Sequence[str], Images], npt.NDArray[np.float64]]
Judge = Callable[[Sequence[str], Images, Images], list[str]]  # "A", "B", "tie", or "" for no verdict, of each pair
RESIDUAL = 0.1  # weight of what is far from real pictures beside the mean log-probability of a word
ROWS, AXES = 4096, 24  # real pictures that principal directions are taken from, and their number


class Teacher(Protocol):
    """An image model of which nothing is known but what it draws."""

    def __call__(self, prompts: Sequence[str]) -> Images:
        """One picture for each prompt, (N, C, H, W) uint8."""


class Drawn:
    """A diffusion model as a teacher."""

    def __init__(self, model: Diffuser, *, guidance: float, steps: int, generator: torch.Generator) -> None:
        self.model, self.guidance, self.steps, self.generator = model, guidance, steps, generator

    def __call__(self, prompts: Sequence[str]) -> Images:
        return draw(self.model, prompts, guidance=self.guidance, steps=self.steps, generator=self.generator)


def small_teacher(
    images: Images,
    prompts: Sequence[str],
    *,
    channels: int,
    prediction: str,
    steps: int,
    batch: int,
    lr: float,
    prompt_dropout: float,
    generator: torch.Generator,
    device: str,
) -> Diffuser:
    """A small diffusion model, trained on images (N, C, H, W) and their prompts."""
    model = build(images.shape[1:], prompts, channels=channels, prediction=prediction).to(device)
    denoise(
        model,
        images,
        model.tokens(prompts),
        [*model.unet.parameters(), *model.text.parameters()],
        steps=steps,
        batch=batch,
        lr=lr,
        weight_decay=0.0,
        prompt_dropout=prompt_dropout,
        generator=generator,
        what="train teacher",
    )
    return model


class Purse:
    """Teachers that together may be called `calls` times: a call is one picture of one teacher, kept or not."""

    def __init__(self, teachers: Sequence[Teacher], calls: int) -> None:
        self.teachers, self.calls, self.spent = tuple(teachers), calls, 0

    def affordable(self) -> int:
        """For how many prompts each teacher can still be asked."""
        return (self.calls - self.spent) // len(self.teachers)

    def ask(self, prompts: Sequence[str], judge: Judge, rng: np.random.Generator) -> list[tuple[str, npt.NDArray[np.uint8], int]]:
        """Prompt, picture and teacher for each of the first prompts, as far as the calls go.

        Of several teachers each draws, and they meet in a knock-out: the winner of two meets the next, and only the last one's stays.
        """
        prompts = list(prompts)[: self.affordable()]
        if not prompts:
            return []
        best, owner = np.zeros(0, dtype=np.uint8), np.zeros(len(prompts), dtype=np.int64)
        for at, teacher in enumerate(self.teachers):
            self.spent += len(prompts)
            pictures = teacher(prompts)
            if at == 0:
                best = pictures.copy()
                continue
            won = np.array([verdict == "second" for verdict in compare(judge, prompts, best, pictures, rng)])
            best[won], owner[won] = pictures[won], at
        return list(zip(prompts, best, owner.tolist(), strict=True))


def compare(judge: Judge, prompts: Sequence[str], first: Images, second: Images, rng: np.random.Generator) -> list[str]:
    """ "first", "second", "tie" or "" for each prompt. Which picture the judge sees as A is drawn for each, and undone afterwards."""
    swapped = rng.random(len(prompts)) < 0.5
    turned = swapped[:, None, None, None]
    verdicts = judge(prompts, np.where(turned, second, first), np.where(turned, first, second))
    meant = {("A", False): "first", ("B", False): "second", ("A", True): "second", ("B", True): "first"}
    return [meant.get((verdict, bool(turn)), verdict) for verdict, turn in zip(verdicts, swapped, strict=True)]


def by_score(score: Score, margin: float) -> Judge:
    """A judge that takes the picture with the higher score; closer than `margin` is a tie."""

    def judge(prompts: Sequence[str], first: Images, second: Images) -> list[str]:
        lead = score(prompts, first) - score(prompts, second)
        return ["tie" if abs(gap) <= margin else "A" if gap > 0 else "B" for gap in lead.tolist()]

    return judge


def by_language(score: Score, director: Written) -> Judge:
    """A judge that is a language model: it cannot see, and is told the scores."""

    def judge(prompts: Sequence[str], first: Images, second: Images) -> list[str]:
        of_each = zip(prompts, score(prompts, first).tolist(), score(prompts, second).tolist(), strict=True)
        return [director.verdict(prompt, ours, theirs) for prompt, ours, theirs in of_each]

    return judge


class WordScore:
    """How well a picture fits a prompt: mean log-probability of the prompt's words, less how far it is from real pictures.

    A small network says for each group of words which one the picture shows. The distance is what is left of the picture outside of the
    real ones' principal directions, as a multiple of what is usually left of a real one.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        images: Images,
        prompts: Sequence[str],
        *,
        steps: int,
        generator: torch.Generator,
        batch: int = 64,
        lr: float = 3e-3,
    ) -> None:
        """Trains the network on real images (N, C, H, W) and their prompts."""
        self.vocabulary = vocabulary
        self.starts = np.cumsum([0, *map(len, vocabulary.groups)]).tolist()
        mean, std = loop.pixel_stats(images)
        small = min(images.shape[2:]) // (2 if min(images.shape[2:]) >= 16 else 1)
        widths = (16, 32) if small >= 4 else (16,)
        self.net = networks.convnet(images.shape[1:], self.starts[-1], widths=widths, hidden=64, mean=mean, std=std)
        targets = self._targets(prompts)
        optimiser = torch.optim.AdamW(self.net.parameters(), lr=lr, weight_decay=0.01)
        schedule = loop.one_cycle(optimiser, lr, steps)
        batches = loop.index_batches(len(images), batch, steps, generator)
        for _ in track(range(steps), "train judge"):
            at = next(batches)
            loss = -self._fit(self.net(loop.to_float(images[at.numpy()])), targets[at]).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        loop.check_finite(self.net, "train judge", lr)
        self.net.eval()
        flat = loop.to_float(images[:: -(-len(images) // ROWS)]).flatten(1)
        self.centre = flat.mean(0)
        self.axes = torch.pca_lowrank(flat, q=min(AXES, *flat.shape))[2]
        self.usual = max(float(self._left(images).mean()), 1e-6)

    def __call__(self, prompts: Sequence[str], images: Images) -> npt.NDArray[np.float64]:
        fits = self._fit(loop.predict(self.net, images), self._targets(prompts))
        return (fits - RESIDUAL * self._left(images) / self.usual).detach().double().numpy()

    def _targets(self, prompts: Sequence[str]) -> Tensor:
        """Position of each group's word (N, G), -1 where the prompt has none of the group."""
        said = [self.vocabulary.said(prompt) for prompt in prompts]
        return torch.tensor([[words.get(group, -1) for group in range(len(self.vocabulary.groups))] for words in said])

    def _fit(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean log-probability (N,) of the words that are there."""
        pieces = logits.split([end - start for start, end in zip(self.starts, self.starts[1:], strict=False)], 1)
        each = [-F.cross_entropy(part, want, reduction="none", ignore_index=-1) for part, want in zip(pieces, targets.T, strict=True)]
        return torch.stack(each).sum(0) / (targets >= 0).sum(1).clamp(min=1)

    def _left(self, images: Images) -> Tensor:
        """Mean square (N,) outside of the principal directions."""
        flat = loop.to_float(images).flatten(1) - self.centre
        return (flat - flat @ self.axes @ self.axes.T).square().mean(1)


class ClipScore:
    """Cosine of picture and prompt by CLIP."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        """From a folder or the hub. Raises UserError where `name` is no CLIP."""
        self.clip = clip.load(name, setting="judge").to(device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], images: Images) -> npt.NDArray[np.float64]:
        texts = clip.text_features(self.clip, prompts).cpu()
        return (clip.embed_images(self.clip, images) * texts).sum(1).double().numpy()
