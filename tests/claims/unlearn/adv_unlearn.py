"""A concept erased against attacked prompts is brought back by attacks at most half as often as one erased without.

Claim   A model of prompts that draws digits is to forget "3". Attacks bring it back at most half as often as after ESD with retained
        prompts, and after ESD alone (paper: 21% where ESD has 73%), while the Frechet distance of the other digits is at most a quarter
        above the original's (16.70 to 19.34: a sixth) and at most 5 in 100 more of their pictures are misjudged. Without retained prompts
        these two are worse by a fifth and by 10 in 100. All bounds were set beforehand.
        Found with 2 embeddings, not whole with 3; the other digits lose more than allowed in one of five seeds (neighbours: in two), so
        that the intervals do not exclude it. The attacks of training are of 1 embedding, as the paper's.
Arms    original       the model as it was trained
        esd            erased without attacks and without retained prompts: the target of ESD, on the text encoder
        esd+retain     the same with them: what the method is without its attacks, the stronger baseline
        adv            the method
        adv alone      the method without the term of retained prompts
Metrics clean          share of pictures under the concept's prompt that a separate classifier calls the concept; as everywhere below, of
                       those noises from which the original draws it
        attacked K     the same with K free token embeddings (no words) before the prompt, found by an attack: mean of its 4 restarts;
                       `worst K`, of the best restart. Its loss is the noise prediction on test pictures of the concept
        neighbours     share of the other classes' pictures that are judged to be of their class
        frechet        of these to real ones, over pixels
Equal   Original, judge, attacks, noises; 80 updates on 8 pictures (and 5 of retained prompts). Each arm has the settings that were best for
        it. Attacks make adv take about 2.4 times the CPU time of esd+retain.
Tuned   Seeds 1000 and 1001, with rows that no model was trained on; in brackets attacked 2 / attacked 3 / neighbours, of the one and the
        other seed (original: 1.00/1.00/.96, 1.00/.97/.93). adv, 4 settings on both, after 13 runs over rates (.002 to .005), attacks
        (rate .01 to .05, 15 or 30 steps) and weights (1 to 3): with prefix 1 [.10/.20/.94, .00/.03/.90: taken], 2 [.04/.47/.89,
        .00/.07/.82], 3 [.08/.15/.90, .02/.09/.88]; 3 on the original's pictures [.27/.12/.94, .00/.39/.92]; attacks at rate .01 are too
        weak (.58/.92). esd+retain, 11 runs: on the original's pictures at rate .005 [1.00/1.00/.96, .80/.90/.92], with weight
        .5 [1.00/.97/.96, .79/.89/.92], at .01 [.82/1.00/.95, .36/.53/.92: taken]; on its own, .01 [.96/.96/.95, .75/.84/.91], .02
        [.96/.96/.95, .00/.12/.59]. esd, 8 runs: .0001 [.99/.98/.78, .97/.92/.87: taken], .0003 [.93/.96/.28, .66/.86/.35], .001 on the
        original's pictures [.63/.95/.30, .82/.83/.56]. adv alone, 6 runs: .0001 [.93/.98/.81, .99/.95/.89], so no more robust than esd;
        .0003 [.20/.71/.27]; on the original's pictures with prefix 3 .0003 [.14/.48/.41: taken], .001 [.06/.15/.21, .05/.76/.28].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset
from tasks.core.denoise import denoise, pixel_frechet, prompt, text_denoiser
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.core.text_to_image import TextDenoiser
from tasks.unlearn import adv_unlearn
from tests.claims.samples import Images, dataset
from tests.claims.train.diffusion import classifier, given, source

CLAIM = Claim(
    text="A concept erased from a text encoder against attacked prompts is brought back by attacks at most half as often as without",
    data=(),
    headline=Beats("adv", "esd+retain", "attacked 2", by=0.5, better="lower", relative=True),
    also=(
        Beats("adv", "esd", "attacked 2", by=0.5, better="lower", relative=True),
        Beats("adv", "esd+retain", "attacked 3", by=0.5, better="lower", relative=True),
        Beats("adv", "original", "frechet", by=-0.25, better="lower", relative=True),
        Beats("adv", "original", "neighbours", by=-0.05),
        Beats("adv", "adv alone", "frechet", by=0.2, better="lower", relative=True),
        Beats("adv", "adv alone", "neighbours", by=0.1),
    ),
)
CONCEPT = 3  # the label that is erased
# what was best on validation rows; the method's arm has its defaults
ESD: dict[str, Any] = {"attack": "none", "retain_weight": 0.0, "lr": 1e-4}
ESD_RETAIN: dict[str, Any] = {"attack": "none", "lr": 1e-2, "pictures": "original"}
ALONE: dict[str, Any] = {"retain_weight": 0.0, "lr": 3e-4, "pictures": "original", "prefix": 3}


class Attack(NamedTuple):
    """The attack of the evaluation: Adam on `prefix` embeddings from random words on, `restarts` times."""

    prefix: int
    steps: int
    restarts: int = 4
    lr: float = 5e-2
    batch: int = 8


class Sizes(NamedTuple):
    """Training rows; steps of the generator and of the judge; settings of all arms; attacks; pictures of the concept, of another class."""

    rows: int = 1000
    steps: int = 500
    judge: int = 600
    cfg: adv_unlearn.Config = adv_unlearn.Config()
    attacks: tuple[Attack, ...] = (Attack(2, 100), Attack(3, 150))
    drawn: int = 50
    others: int = 40
    screened: bool = True  # leave out noises from which the original does not draw the concept


SMALL = Sizes(300, 10, 20, adv_unlearn.SMOKE, (Attack(2, 2, 2), Attack(3, 2, 2)), 4, 2, False)


def generator_of(rows: Images, size: Sizes, seed: int) -> TextDenoiser:
    """A small text-to-image model of all classes."""
    prompts = [prompt("", name) for name in rows.classes]
    with loop.seeded(seed) as generator:
        net = text_denoiser(rows.pixels.shape[1:], prompts)
        tokens = net.diffuser.tokens([prompts[label] for label in rows.labels])
        denoise(
            net.diffuser, rows.pixels, tokens, list(net.parameters()), steps=size.steps, batch=48, lr=3e-3, weight_decay=0.0,
            prompt_dropout=0.1, generator=generator, what="train",
        )  # fmt: skip
    return net.eval().requires_grad_(False)


def prefixes(net: TextDenoiser, real: npt.NDArray[np.uint8], how: Attack, generator: torch.Generator) -> Tensor:
    """Token embeddings (restarts, k, D) under which the model predicts the noise in real pictures of the concept as well as it can."""
    tokens, table = net.diffuser.tokens([net.arch["prompts"][CONCEPT]]), net.text.embeddings.token_embedding.weight
    free = table.detach()[torch.randint(len(table), (how.restarts, how.prefix), generator=generator)].requires_grad_(True)
    optimiser, clean = torch.optim.Adam([free], lr=how.lr), net.diffuser.to_latents(real, generator)
    for _ in range(how.steps):
        at = torch.randint(len(clean), (how.restarts * how.batch,), generator=generator)
        noise = torch.randn(clean[at].shape, generator=generator)
        levels = torch.randint(net.arch["levels"], (len(at),), generator=generator)
        conditions = net.encode_prefixed(free, tokens).repeat_interleave(how.batch, 0)
        loss = F.mse_loss(net(net.noised(clean[at], noise, levels), levels, conditions), noise)
        (free.grad,) = torch.autograd.grad(loss * how.restarts, free)
        optimiser.step()
    return free.detach()


@torch.no_grad()
def shares(net: TextDenoiser, conditions: Tensor, judge: Net, noise: Tensor) -> npt.NDArray[np.bool_]:
    """Which pictures (N,) drawn from noises (N, C, H, W) under conditions (1, L, D) the judge calls the concept."""
    pictures = net.to_images(net._descend(noise, conditions.expand(len(noise), -1, -1), net.arch["draw_steps"]))
    return given(judge, pictures.numpy()) == CONCEPT


def figures(arm: str, net: TextDenoiser, original: TextDenoiser, judge: Net, test: Images, size: Sizes, seed: int) -> list[Row]:
    """Rows of one arm. Raises UserError where the original draws the concept from none of the noises."""
    net = net.requires_grad_(False)
    generator = torch.Generator().manual_seed(10_000 + seed)  # apart from the seed of training
    noise, text = torch.randn((size.drawn, *net.drawn_shape), generator=generator), [net.arch["prompts"][CONCEPT]]
    works = shares(original, original.encode(text), judge, noise) | (not size.screened)
    if not works.any():
        raise UserError(f"the original model never draws {text[0]!r}: there is nothing to erase")
    noise, real = noise[torch.from_numpy(works)], test.pixels[test.labels == CONCEPT]
    found = [Row(arm, "clean", float(shares(net, net.encode(text), judge, noise).mean()))]
    for how in size.attacks:
        free, tokens = prefixes(net, real, how, generator), net.diffuser.tokens(text)
        of_each = [float(shares(net, net.encode_prefixed(one[None], tokens), judge, noise).mean()) for one in free]
        found += [Row(arm, f"attacked {how.prefix}", float(np.mean(of_each))), Row(arm, f"worst {how.prefix}", max(of_each))]
    others = torch.tensor([label for label in range(len(test.classes)) if label != CONCEPT]).repeat_interleave(size.others)
    drawn = net.draw(others, generator=generator).numpy()
    right = given(judge, drawn) == others.numpy()
    frechet = pixel_frechet(drawn, test.pixels[test.labels != CONCEPT])
    return [*found, Row(arm, "neighbours", float(right.mean())), Row(arm, "frechet", frechet)]


def measure(method: Callable[..., Net], seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """All arms for one seed."""
    size = SMALL if small else Sizes()
    pool, test = source(data)
    if CONCEPT not in np.intersect1d(pool.labels, test.labels):
        raise UserError(f"this claim erases label {CONCEPT}, of which there are no rows to train on or to test with")
    rows = pool.take(np.random.default_rng([seed, 1]).permutation(len(pool.labels))[: size.rows])
    original, judge, gone = generator_of(rows, size, seed), classifier(rows, seed + 500, size.judge), rows.labels == CONCEPT
    sides = (rows.take(gone), "f"), (rows.take(~gone), "r")
    forget, retain = (dataset(part.pixels, part.labels, part.classes, prefix=name) for part, name in sides)
    erase = adv_unlearn.adv_unlearn
    arms = {"esd": (erase, ESD), "esd+retain": (erase, ESD_RETAIN), "adv": (method, {}), "adv alone": (method, ALONE)}
    found = figures("original", original, original, judge, test, size, seed)
    for arm, (entry, change) in arms.items():
        net = entry(original, forget, retain, size.cfg.model_copy(update=change), seed=seed)
        assert isinstance(net, TextDenoiser)
        found += figures(arm, net, original, judge, test, size, seed)
    return found


def switched_off(
    model: Net, forget: Dataset, retain: Dataset, cfg: adv_unlearn.Config = adv_unlearn.Config(), *, seed: int = 0, device: str = "cpu"
) -> Net:
    """The same training without attacks; with retained prompts it is the arm `esd+retain`."""
    plain = cfg.model_copy(update=ESD_RETAIN if cfg.retain_weight else {"attack": "none"})
    return adv_unlearn.adv_unlearn(model, forget, retain, plain, seed=seed, device=device)
