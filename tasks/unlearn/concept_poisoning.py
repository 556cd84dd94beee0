"""Forget a class by fine-tuning on poisoned images of it: a patch of another class where its main concept sat, and a wrong label.

Paper   Class Machine Unlearning for Complex Data via Concepts Inference and Data Poisoning (2024), arXiv 2405.15662
Idea    concept inference finds the concept that the class hangs on, and integrated gradients where each image to forget has it. There
        a patch of a donor class (the one most easily confused) is pasted, and the image relabelled as donor, or at random. Then
        CE on retained and poisoned rows together, of the last layer alone.
Small   concepts come from the network itself: k-means of the features of single patches, a linear SVM for each cluster, where the paper
        has names of concepts and CLIP; the donor is chosen by logits and not by hand. A random label is never the row's own. The last
        layer is trained on features computed once. The paper's part for language models (masked tokens, LoRA) is left out.
Limits  it trains on what it shall forget: all of a poisoned image but the patch stays. Fashion-MNIST, 4,000 rows, a class (5 seeds, test):
        average gap 0.10 (doing nothing 50.1), at 0.11 of retraining's CPU time. The new label without a patch: 0.07, at 0.03. A patch
        under the old label forgets nothing. Features stay as they were: a last layer fitted anew knows the class as before, and its rows
        are relearnt in 21 steps (label alone 24, from 6 to 37 by seed and learning rate; retrained 29). The window located is not always
        what the class hangs on: black, it takes 2.9 of the logit's margin (sd 5.4; a random one 1.1): much in three seeds, little in two.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import method
from tasks.core.networks import Net
from tasks.core.progress import track
from tasks.unlearn import _concepts
from tasks.unlearn._concepts import Bank, Corners, Grid, Pixels
from tasks.unlearn._shared import forgotten, retained

Labels = npt.NDArray[np.int64]
Patch = Literal["concept", "random", "none"]
Label = Literal["donor", "random", "keep"]


class Config(loop.Recipe):
    """Settings: the shared recipe, how a row is poisoned, and how concepts are inferred."""

    steps: int = Field(150, ge=1, description="batches seen")  # paper: 20 to 30 epochs
    layers: Literal["last", "all"] = Field("last", description="what is trained: the last layer, or the whole network")  # paper: last
    patch: Patch = Field("concept", description="what is pasted where: by concept, a random window at a random place, or nothing")
    label: Label = Field("donor", description="label of poisoned rows: the donor class, a random other class, or their own")
    concepts: int = Field(32, ge=2, description="clusters of patches")
    patches: int = Field(2000, ge=2, description="patches that concepts are learned from")
    window: float = Field(2 / 7, gt=0, le=1, description="size of a patch as a share of the image's shorter side")  # code: 64 of 224 px
    stride: float = Field(1 / 14, gt=0, le=1, description="step from window to window as a share of it")  # public code: 16 of 224 px
    svm_c: float = Field(0.1, gt=0, description="C of the SVMs of concept vectors")  # concept bottlenecks: 0.001 to 10
    sparsity: float = Field(1e-3, gt=0, description="weight of the elastic net on the bottleneck's last layer")
    ig_steps: int = Field(8, ge=1, description="steps of integrated gradients")


SMOKE = Config(steps=10, batch=16, concepts=3, patches=40, ig_steps=2)


def donor_classes(logits: Tensor, labels: Labels, others: Labels) -> dict[int, int]:
    """For each class among the labels (N,), the class of `others` that its rows have the highest mean logit (N, K) for, itself apart.

    Raises UserError where `others` has no class besides it.
    """
    found = {}
    for own in np.unique(labels).tolist():
        rivals = others[others != own]
        if len(rivals) == 0:
            raise UserError(f"no class but {own} is retained: there is no other to take patches and labels from")
        found[own] = int(rivals[int(logits[torch.from_numpy(labels == own)].mean(0)[rivals].argmax())])
    return found


def new_labels(labels: Labels, donors: dict[int, int], others: Labels, how: Label, generator: torch.Generator) -> Labels:
    """Labels of the poisoned rows (N,): their donor's, one of `others` that is not their own, or their own."""
    if how == "keep":
        return labels.copy()
    if how == "donor":
        return np.array([donors[own] for own in labels.tolist()], dtype=np.int64)
    drawn = torch.rand(len(labels), generator=generator).tolist()
    rivals = [others[others != own] for own in labels.tolist()]
    return np.array([pool[int(share * len(pool))] for pool, share in zip(rivals, drawn, strict=True)], dtype=np.int64)


def paste(images: Pixels, at: Corners, donors: Pixels, taken: Corners, size: int) -> Pixels:
    """Copies of the images (N, C, H, W) whose windows at corners `at` (N, 2) show those of the donors (N, C, H, W) at `taken` (N, 2)."""
    made = images.copy()
    for row, ((top, left), (from_top, from_left)) in enumerate(zip(at, taken, strict=True)):
        made[row, :, top : top + size, left : left + size] = donors[row, :, from_top : from_top + size, from_left : from_left + size]
    return made


def random_corners(n: int, grid: Grid, shape: tuple[int, ...], generator: torch.Generator) -> Corners:
    """Corners (n, 2) of windows of images (..., H, W), drawn evenly."""
    every = grid.corners(shape)
    return every[torch.randint(len(every), (n,), generator=generator).numpy()]


def learn_concepts(
    net: Net,
    images: Pixels,
    labels: Labels,
    classes: Iterable[int],
    grid: Grid,
    *,
    concepts: int,
    patches: int,
    svm_c: float,
    sparsity: float,
    generator: torch.Generator,
    device: str = "cpu",
) -> tuple[Bank, dict[int, int]]:
    """Concepts of patches drawn from images (N, C, H, W), one window each, and for each of the classes the one that weighs most."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    rows = torch.randint(len(images), (patches,), generator=generator).numpy()
    shown = _concepts.alone(images[rows], random_corners(patches, grid, images.shape, generator), grid.size)
    bank = _concepts.learn_bank(_concepts.features_of(net, shown, device), concepts, svm_c, seed)
    distances = bank.distances(_concepts.features_of(net, images, device))
    return bank, {one: int(_concepts.class_weights(distances, labels == one, sparsity, seed).argmax()) for one in sorted(classes)}


def fit_head(
    net: Net,
    features: Tensor,
    labels: Labels,
    shares: Tensor,
    *,
    steps: int,
    batch: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    generator: torch.Generator,
    device: str = "cpu",
) -> Net:
    """Train the last layer in place by SGD on features (N, D) that are computed once; row i counts `shares` (N,) times in its batch.

    The rest of the network is left alone. Gives it back on the CPU, in eval mode. Raises UserError where training diverged.
    """
    head: nn.Linear = net.head.to(device)
    features, targets, shares = features.to(device), torch.from_numpy(labels).to(device), shares.to(device)
    optimiser = torch.optim.SGD(head.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    schedule = loop.one_cycle(optimiser, lr, steps)
    for at in track(list(loop.index_batches(len(features), batch, steps, generator)), "unlearn"):
        at = at.to(device)
        loss = (shares[at] * F.cross_entropy(head(features[at]), targets[at], reduction="none")).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    loop.check_finite(net, "unlearn", lr)
    return net.cpu().eval()


def row_shares(synthetic: npt.NDArray[np.bool_], real_weight: float) -> Tensor:
    """Weight of each row (N,), 1 on average, so that real rows weigh `real_weight` together; all 1 where rows are of one kind only."""
    if synthetic.all() or not synthetic.any():
        return torch.ones(len(synthetic))
    made = (1 - real_weight) / synthetic.mean()
    return torch.from_numpy(np.where(synthetic, made, real_weight / (~synthetic).mean())).float()


@method(
    paper="Class Machine Unlearning for Complex Data via Concepts Inference and Data Poisoning (2024)",
    arxiv="2405.15662",
    claim="a class is forgotten (UA >= 95) within 2 points of the retrained reference's test accuracy, at a fraction of its cost",
)
def concept_poisoning(model: Net, forget: Dataset, retain: Dataset, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Net:
    """A copy of `model` tuned on the labelled rows of `retain` and on poisoned copies of those of `forget`.

    Meant for a whole class; rows of several are each treated after their own class. Raises UserError where the sets are empty, without
    labels, share a row or do not fit the model, where no other class is retained, or where training diverged.
    """
    images, labels, synthetic = retained(model, forget, retain)
    gone, own = forgotten(model, forget)
    others = np.unique(labels)
    with loop.seeded(seed) as generator:
        # of its own, so that whatever is drawn to poison rows, the batches stay the same
        poison = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        net = copy.deepcopy(model).to(device).eval().requires_grad_(False)
        donors = donor_classes(loop.predict(net, gone, device=device), own, others)
        bad = new_labels(own, donors, others, cfg.label, poison)
        if cfg.patch != "none":
            grid = _concepts.grid_of(gone.shape, cfg.window, cfg.stride)
            givers = np.empty_like(gone)
            for one, donor in donors.items():
                rows, pool = np.flatnonzero(own == one), np.flatnonzero(labels == donor)
                givers[rows] = images[pool[torch.randint(len(pool), (len(rows),), generator=poison).numpy()]]
            at, taken = (random_corners(len(gone), grid, gone.shape, poison) for _ in range(2))
            if cfg.patch == "concept":
                inference = cfg.model_dump(include={"concepts", "patches", "svm_c", "sparsity"})
                every, of = np.concatenate([images, gone]), np.concatenate([labels, own])
                bank, tops = learn_concepts(net, every, of, {*donors, *donors.values()}, grid, generator=poison, device=device, **inference)
                for one, donor in donors.items():
                    rows = np.flatnonzero(own == one)
                    at[rows] = _concepts.locate(net, bank, tops[one], gone[rows], grid, cfg.ig_steps, device)
                    taken[rows] = _concepts.locate(net, bank, tops[donor], givers[rows], grid, cfg.ig_steps, device)
            gone = paste(gone, at, givers, taken, grid.size)
        images, labels = np.concatenate([images, gone]), np.concatenate([labels, bad])
        synthetic = np.concatenate([synthetic, np.zeros(len(gone), dtype=bool)])
        recipe = cfg.model_dump(include=set(loop.Recipe.model_fields))
        if cfg.layers == "all":
            net.requires_grad_(True)
            return loop.fit_supervised(net, images, labels, synthetic, generator=generator, device=device, what="unlearn", **recipe)
        features, shares = _concepts.features_of(net, images, device), row_shares(synthetic, recipe.pop("real_weight"))
        net.head.requires_grad_(True)
        return fit_head(net, features, labels, shares, generator=generator, device=device, **recipe).requires_grad_(True)
