"""Train a network to give the targets of condensed samples, then give it a fresh last layer for the classes: a start for fine-tuning.

Paper   Self-Supervised Dataset Distillation for Transfer Learning (KRR-ST, ICLR 2024), arXiv 2310.06511: how it uses its samples
Idea    SGD on the mean square of net(pixels) - target, without augmentation; the layer that gave targets is then thrown away. What comes
        next is fine-tuning of all weights on labelled rows: `train.supervised` with this network as its start
Small   a ConvNet of the size that `train.supervised` makes, with batch normalisation as the paper's networks have it; 300 epochs at a
        rate of .03 instead of 1,000 at .1: on validation rows, 1 seed, .661 against .657 for 300 at .1. The rest is the paper's
Limits  No gain is seen here: Fashion-MNIST, 100 samples, 5 labels a class, 5 seeds, test: .651 (sd .010), pre-trained on random images with
        the same targets .650 (.009), from scratch .650 (.022). On one validation seed it had looked like one (.661, .655, .649).
        Without normalisation (`norm`) the samples of KRR-ST, whose own networks have it, do harm: .61 where first weights give .64
        (1 seed), and a rate of .3 kills the network. The network depends on all parents of the samples: erasing one of them means
        condensing and pre-training anew
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import MethodConfig, method
from tasks.core.networks import Net
from tasks.core.progress import track


class Config(MethodConfig):
    """Settings of pre-training, and of a fresh network: the size that of `train.supervised`."""

    epochs: int = Field(300, ge=1, description="passes over the condensed samples")  # paper: 1000; tuned, as the next
    batch: int = Field(256, ge=1, description="samples of a batch")  # paper
    lr: float = Field(0.03, gt=0, description="learning rate of SGD")  # paper: 0.1
    momentum: float = Field(0.9, ge=0, lt=1)  # original code
    weight_decay: float = Field(1e-3, ge=0)  # paper
    widths: tuple[int, ...] = Field((32, 64), min_length=1, description="channels of each convolution of a fresh network")
    hidden: int = Field(128, ge=1, description="features before the last layer of a fresh network")
    norm: Literal["", "batch"] = Field("batch", description="normalisation in a fresh network: batch, as in the paper, or none")


SMOKE = Config(epochs=5, batch=8, widths=(8,), hidden=16)
READS = "condensed"


@method(
    paper="Self-Supervised Dataset Distillation for Transfer Learning (ICLR 2024)",
    arxiv="2310.06511",
    claim="fine-tuned on few labels, it beats training on them from scratch, and pre-training on random images with the same targets",
)
def from_condensed(data: Dataset, cfg: Config = Config(), *, start: Net | None = None, seed: int = 0, device: str = "cpu") -> Net:
    """A network for the classes of `data`, whose body has learnt the targets; on from a copy of the body of `start` where one is given.

    Raises UserError where `data` holds no condensed rows or names no classes, `start` does not fit it, or training diverged.
    """
    pixels, targets = samples(data)
    classes = len(data.info.classes)
    if classes == 0:
        raise UserError("the condensed rows name no classes, so there is nothing that a last layer could tell apart")
    with loop.seeded(seed) as generator:
        if start is None:
            mean, std = float(pixels.mean()), float(pixels.std(correction=0)) or 1.0
            net = networks.convnet(
                data.info.shape, targets.shape[1], widths=cfg.widths, hidden=cfg.hidden, mean=mean, std=std, norm=cfg.norm
            )
        else:
            check_start(start, data)
            net = headed(start, targets.shape[1])
        fit_targets(
            net,
            pixels,
            targets,
            steps=cfg.epochs * -(-len(pixels) // cfg.batch),
            batch=min(cfg.batch, len(pixels)),
            lr=cfg.lr,
            momentum=cfg.momentum,
            weight_decay=cfg.weight_decay,
            generator=generator,
            device=device,
        )
        return headed(net, classes).eval()


def samples(data: Dataset) -> tuple[Tensor, Tensor]:
    """Exact pixels (n, C, H, W) and targets (n, D) of condensed rows. Raises UserError for rows of another schema, or none."""
    if data.info.schema != READS:
        raise UserError(
            f"train.from_condensed takes condensed rows, such as data/condensed; these are of schema {data.info.schema!r}: "
            "train.supervised learns from labelled ones"
        )
    if len(data) == 0:
        raise UserError("there are no condensed rows to train on: at least one is needed")
    pixels, targets = (torch.from_numpy(np.array(data.column(name).to_pylist(), np.float32)) for name in ("pixels", "target"))
    return pixels.reshape(-1, *data.info.shape), targets


def headed(net: Net, outputs: int) -> Net:
    """A copy with a fresh last layer of so many outputs. Its weights come from torch's global generator."""
    copy = networks.build({**net.arch, "classes": outputs})
    copy.load_state_dict({**net.state_dict(), **{f"head.{name}": value for name, value in copy.head.state_dict().items()}})
    return copy


def fit_targets(
    net: Net,
    pixels: Tensor,
    targets: Tensor,
    *,
    steps: int,
    batch: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    generator: torch.Generator,
    device: str = "cpu",
) -> None:
    """Train in place by SGD on the mean squared error of net(pixels) (n, C, H, W) and targets (n, D); leaves it on the CPU.

    Raises UserError where training diverged.
    """
    net.to(device).train()
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    batches = loop.index_batches(len(pixels), batch, steps, generator)
    for _ in track(range(steps), "pre-train"):
        at = next(batches)
        loss = F.mse_loss(net(pixels[at].to(device)), targets[at].to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    loop.check_finite(net, "pre-train", lr)
    net.cpu()


def check_start(start: Net, data: Dataset) -> None:
    """Raises UserError where the network is no plain one or takes other images."""
    kind, shape = start.arch["kind"], tuple(start.arch["shape"])
    if kind != "convnet" or shape != tuple(data.info.shape):
        raise UserError(
            f"the model to start from is a {kind} for images {shape}; train.from_condensed goes on from a convnet for "
            f"{tuple(data.info.shape)}"
        )
