"""What the condensers share: source rows, a self-supervised target encoder, kernel ridge regression, measuring, and the rows they give.

All methods draw the same source rows, train the same encoder and pick the same random images from the same seed, so that their
figures can be compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.dataset import SCHEMAS, Dataset, encode, image_column
from tasks.core.errors import UserError
from tasks.core.method import MethodConfig
from tasks.core.progress import track

Images = npt.NDArray[np.uint8]
Fill = Literal["edge", "black"]
PADDING = {"edge": "border", "black": "zeros"}


class Settings(MethodConfig):
    """What the condensers must share to be comparable: the encoder that gives targets, and the nets that measure."""

    source_rows: int = Field(10_000, ge=1, description="most rows that are looked at, drawn by the seed; bounds the memory")
    widths: tuple[int, ...] = Field((16, 32, 32), min_length=1, description="channels of the convolutions of every network")
    dim: int = Field(128, ge=1, description="length of a target")  # paper: 512, of a ResNet-18; tuned for few-label accuracy, as the next
    encoder_steps: int = Field(250, ge=0, description="batches that train the encoder")
    encoder_batch: int = Field(64, ge=2, description="rows of an encoder batch, each seen in two views")
    encoder_lr: float = Field(5e-3, gt=0, description="peak learning rate of the encoder's AdamW")
    redundancy: float = Field(1e-2, ge=0, description="weight of the off-diagonal term")  # Barlow Twins: 5e-3
    shift: float = Field(0.125, ge=0, lt=1, description="largest shift, as a share of the side")  # original code: 4 of 32 pixels
    rotate: float = Field(10.0, ge=0, le=180, description="largest rotation in degrees")
    flips: bool = Field(False, description="mirror images left to right at random; wrong for digits and letters")
    inner_steps: int = Field(50, ge=1, description="steps that train a small net on the condensed set")  # original code: 1000; tuned
    inner_lr: float = Field(0.1, gt=0, description="learning rate of SGD on the condensed set")  # original code
    nets: int = Field(3, ge=1, description="fresh nets that the held-out loss is averaged over")
    held_out_rows: int = Field(2_000, ge=1, description="most held-out rows that are measured on, drawn by the seed")

    def for_encoder(self) -> dict[str, Any]:
        """Keyword arguments of `prepare`."""
        names = {"source_rows", "widths", "dim", "redundancy", "shift", "rotate", "flips"}
        renamed = {"steps": self.encoder_steps, "batch": self.encoder_batch, "lr": self.encoder_lr}
        return self.model_dump(include=names) | renamed

    def for_measuring(self) -> dict[str, Any]:
        """Keyword arguments of `held_out_losses`."""
        renamed = {"steps": self.inner_steps, "lr": self.inner_lr, "rows": self.held_out_rows}
        return self.model_dump(include={"widths", "nets"}) | renamed


class SmallNet(nn.Module):
    """3x3 convolutions with batch norm, ReLU and mean pooling, then one linear layer, for images (N, C, H, W) in [0, 1].

    Images of 16 pixels and more are halved by the first convolution; pooling stops before a side falls under 4, because kernel ridge
    regression wants more features than condensed images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, int, int], out: int, widths: tuple[int, ...], mean: float, std: float) -> None:
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = []
        for at, wide in enumerate(widths):
            stride = 2 if at == 0 and min(height, width) >= 16 else 1
            layers += [nn.Conv2d(channels, wide, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
            channels, height, width = wide, -(-height // stride), -(-width // stride)
            if min(height, width) >= 8:
                layers.append(nn.AvgPool2d(2))
                height, width = height // 2, width // 2
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels * height * width, out)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def features(self, images: Tensor) -> Tensor:
        """Features (N, D) before the linear layer."""
        features: Tensor = self.body((images - self.mean) / self.std)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Outputs (N, out)."""
        outputs: Tensor = self.head(self.features(images))
        return outputs


@dataclass(frozen=True)
class Source:
    """The rows that a condensed set is made from, and the frozen encoder that was trained on them.

    ids (R,); images (R, C, H, W) uint8; encoder gives targets (N, dim), standardised over the source rows; targets (R, dim);
    mean, std of the pixels; encoder_loss: Barlow Twins loss per dimension over the last tenth of its training.
    """

    ids: list[str]
    images: Images
    encoder: SmallNet
    targets: Tensor
    mean: float
    std: float
    encoder_loss: float


def prepare(
    data: Dataset,
    n: int,
    *,
    source_rows: int,
    widths: tuple[int, ...],
    dim: int,
    steps: int,
    batch: int,
    lr: float,
    redundancy: float,
    shift: float,
    rotate: float,
    flips: bool,
    generator: torch.Generator,
    device: str,
) -> Source:
    """Draw the source rows and train the target encoder on them. Raises UserError where there are fewer rows than samples are asked for."""
    available = min(len(data), source_rows)
    if n < 1:
        raise UserError(f"a condensed set needs at least one sample, but n is {n}; valid: 1 to {available}")
    if n > available:
        limit = f"the data has {len(data)} rows" + (f", of which source_rows lets {source_rows} be used" if source_rows < len(data) else "")
        raise UserError(f"cannot condense to n = {n} samples: {limit}; valid: 1 to {available}")
    source = data.take(torch.randperm(len(data), generator=generator)[:available].numpy())
    images = source.images()
    mean, std = loop.pixel_stats(images)
    encoder = SmallNet(data.info.shape, dim, widths, mean, std)
    how = {"steps": steps, "batch": batch, "lr": lr, "redundancy": redundancy, "shift": shift, "rotate": rotate, "flips": flips}
    loss = train_encoder(encoder, images, **how, generator=generator, device=device)  # type: ignore[arg-type]
    return Source(source.ids(), images, encoder, loop.predict(encoder, images, device=device), mean, std, loss)


def train_encoder(
    encoder: SmallNet,
    images: Images,
    *,
    steps: int,
    batch: int,
    lr: float,
    redundancy: float,
    shift: float,
    rotate: float,
    flips: bool,
    generator: torch.Generator,
    device: str,
) -> float:
    """Train in place by Barlow Twins (arXiv 2103.03230), then fold the standardisation of its outputs into its last layer and freeze it.

    images (R, C, H, W) uint8. The loss is taken behind a projector that is thrown away. Gives the mean loss per dimension over the last
    tenth of the steps, NaN where there were none.
    """
    dim = encoder.head.out_features
    projector = nn.Sequential(nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, 2 * dim)).to(device)
    encoder.to(device).train()
    weights = [*encoder.parameters(), *projector.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=lr, weight_decay=1e-4)
    schedule = loop.one_cycle(optimiser, lr, steps)
    batches = loop.index_batches(len(images), batch, steps, generator)
    losses = []
    for _ in track(range(steps), "train target encoder"):
        clean = loop.to_float(images[next(batches).numpy()])
        one, two = (
            projector(encoder(augment(clean, shift, rotate, flips, generator, contrast=0.3, noise=0.05).to(device))) for _ in range(2)
        )
        loss = barlow_twins_loss(one, two, redundancy)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item() / (2 * dim))
    encoder.requires_grad_(False).eval()
    outputs = loop.predict(encoder, images, device=device)
    centre, scale = outputs.mean(0).to(device), outputs.std(0, correction=0).clamp_min(1e-6).to(device)
    encoder.head.weight.div_(scale[:, None])
    encoder.head.bias.sub_(centre).div_(scale)
    last = losses[-max(1, steps // 10) :]
    return float(np.mean(last)) if last else float("nan")


def barlow_twins_loss(one: Tensor, two: Tensor, redundancy: float) -> Tensor:
    """`sum_i (1 - C_ii)^2 + redundancy * sum_{i != j} C_ij^2` of the cross-correlation C (D, D) of two views (N, D).

    Source: Barlow Twins, equations 1 and 2.
    """
    one, two = ((z - z.mean(0)) / (z.std(0, correction=0) + 1e-6) for z in (one, two))
    correlation = one.T @ two / len(one)
    diagonal = torch.diagonal(correlation)
    off = correlation.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + redundancy * off


def augment(
    images: Tensor,
    shift: float,
    rotate: float,
    flips: bool,
    generator: torch.Generator,
    *,
    contrast: float = 0.0,
    noise: float = 0.0,
    fill: Fill = "edge",
) -> Tensor:
    """Each image (N, C, H, W) in [0, 1], on the CPU, rotated by up to `rotate` degrees and shifted by up to `shift` of its side.

    What comes in from outside continues the edge, or is black. `flips` mirrors half of them; `contrast` scales by 1 +- contrast around
    the image's mean; `noise` is the standard deviation of what is added to each pixel.
    """
    n = len(images)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    angle = uniform(n) * (rotate * math.pi / 180)
    cos, sin = torch.cos(angle), torch.sin(angle)
    sides = torch.tensor([images.shape[3], images.shape[2]])
    moved = (uniform(n, 2) * shift * sides).round() * 2 / sides  # whole pixels: no blur; affine_grid counts a side as 2
    sign = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0) if flips else torch.ones(n)
    theta = torch.stack([torch.stack([cos * sign, -sin, moved[:, 0]], 1), torch.stack([sin * sign, cos, moved[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode=PADDING[fill], align_corners=False)
    if contrast:
        middle = images.mean((1, 2, 3), keepdim=True)
        images = middle + (images - middle) * (1 + contrast * uniform(n, 1, 1, 1))
    if noise:
        images = images + noise * torch.randn(images.shape, generator=generator)
    return images


def krr_predict(real: Tensor, condensed: Tensor, targets: Tensor, ridge: float = 1e-6) -> Tensor:
    """Predictions (R, dim) for features `real` (R, D) of a ridge regression on features `condensed` (n, D) and `targets` (n, dim):
    `K_rs (K_ss + lam I)^-1 Y_s` with `lam = ridge * trace(K_ss)`, no gradient through lam, a bias column in the features.

    Source: KRR-ST and its public code.
    """
    real, condensed = (torch.cat([f, f.new_ones(len(f), 1)], 1) for f in (real, condensed))
    k_ss = condensed @ condensed.T
    lam = ridge * k_ss.detach().trace()
    weights = torch.linalg.solve(k_ss + lam * torch.eye(len(k_ss), dtype=k_ss.dtype, device=k_ss.device), targets)
    predictions: Tensor = real @ (condensed.T @ weights)
    return predictions


def krr_loss(real: Tensor, condensed: Tensor, targets: Tensor, real_targets: Tensor) -> Tensor:
    """Mean squared error over all elements of `krr_predict` against `real_targets` (R, dim)."""
    return F.mse_loss(krr_predict(real, condensed, targets), real_targets)


def sgd(net: nn.Module, lr: float) -> torch.optim.SGD:
    """The optimiser that every small net is trained with on a condensed set (settings of KRR-ST's public code)."""
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)


def fit_condensed(net: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, targets: Tensor, steps: int) -> None:
    """Full-batch MSE steps in place on images (n, C, H, W) and targets (n, dim), without augmentation: with it the outer gradient is
    biased (shown in KRR-ST)."""
    net.train()
    for _ in range(steps):
        optimiser.zero_grad(set_to_none=True)
        F.mse_loss(net(images), targets).backward()
        optimiser.step()


def held_out_losses(
    arms: dict[str, tuple[Tensor, Tensor]],
    held_out: Dataset,
    source: Source,
    *,
    widths: tuple[int, ...],
    steps: int,
    lr: float,
    nets: int,
    rows: int,
    seed: int,
    device: str,
) -> dict[str, float]:
    """KRR loss of each arm's condensed (images, targets) on held-out images, the mean over fresh nets that were trained on that arm.

    The nets' first weights depend on the seed alone, so all arms start from the same nets, none of which took part in condensing. Targets
    are standardised over the source rows: 1 is what the mean of all targets would reach. Raises UserError for no or unfitting images.
    """
    if len(held_out) == 0 or held_out.info.shape != source.images.shape[1:]:
        raise UserError(
            f"the held-out data has {len(held_out)} rows of shape {held_out.info.shape}; valid: at least one, of {source.images.shape[1:]}"
        )
    with loop.seeded(seed) as generator:
        images = held_out.take(torch.randperm(len(held_out), generator=generator)[:rows].numpy()).images()
    wanted = loop.predict(source.encoder, images, device=device).to(device)
    found = {}
    for name, (condensed, targets) in arms.items():
        losses = []
        for which in range(nets):
            with loop.seeded(1_000_003 + nets * seed + which):  # far from the seeds that condensing used
                net = SmallNet(held_out.info.shape, targets.shape[1], widths, source.mean, source.std).to(device)
            fit_condensed(net, sgd(net, lr), condensed.detach().to(device), targets.detach().to(device), steps)
            losses.append(_measure(net.eval(), images, wanted, condensed.detach().to(device), targets.detach().to(device), device))
        found[name] = float(np.mean(losses))
    return found


@torch.no_grad()
def _measure(net: SmallNet, images: Images, wanted: Tensor, condensed: Tensor, targets: Tensor, device: str) -> float:
    real = torch.cat([net.features(loop.to_float(images[at : at + 512], device)) for at in range(0, len(images), 512)])
    return float(krr_loss(real, net.features(condensed), targets, wanted))


def random_positions(rows: int, n: int, generator: torch.Generator) -> npt.NDArray[np.int64]:
    """n different positions (n,) below `rows`, in random order."""
    return torch.randperm(rows, generator=generator)[:n].numpy()


def kmeans_positions(features: npt.NDArray[np.float32], n: int, seed: int) -> npt.NDArray[np.int64]:
    """Positions (n,) of the rows of `features` (R, D) that stand nearest to the centres of n clusters; all different."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):  # several threads add up in an order of their own
        centres = KMeans(n, n_init=1, random_state=seed % 2**32).fit(features).cluster_centers_
    return nearest_distinct(features, centres)


def nearest_distinct(features: npt.NDArray[np.floating], centres: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """For each centre (n, D), in order, the nearest row of `features` (R, D) that no earlier centre took. Gives positions (n,)."""
    free = np.ones(len(features), dtype=bool)
    taken = np.empty(len(centres), dtype=np.int64)
    for at, centre in enumerate(centres):
        distances = np.square(features - centre).sum(1)
        taken[at] = np.where(free, distances, np.inf).argmin()
        free[taken[at]] = False
    return taken


def condensed_rows(
    name: str,
    images: Tensor,
    targets: Tensor,
    origins: npt.NDArray[np.int64],
    ids: list[str],
    labels: npt.NDArray[np.int64] | None = None,
) -> pa.Table:
    """Rows of schema `condensed`. images (n, C, H, W), where 0 is black and 1 white but values may lie outside; targets (n, dim);
    labels (n,), -1 where not known.

    `parents` names all the source rows `ids` (R,) for every sample, first the one at `origins` (n,), which it started from: the others
    formed the encoder, and with it each target.
    """
    n = len(images)
    images, targets = images.detach().cpu(), targets.detach().cpu()
    shown = images.clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    every = np.arange(len(ids))
    order = np.stack([np.concatenate([[own], np.delete(every, own)]) for own in origins])
    parents = pa.array(ids, pa.string()).take(pa.array(order.ravel()))
    return pa.table(
        {
            "sample_id": [f"condensed-{name}-{at:05d}" for at in range(n)],
            "image": image_column(encode(shown)),
            "label": pa.nulls(n, pa.int64()) if labels is None else pa.array(labels, pa.int64(), mask=labels < 0),
            "caption": pa.nulls(n, pa.string()),
            "split": ["train"] * n,
            "parents": _lists(parents, n),
            "pixels": _lists(pa.array(images.reshape(-1).numpy()), n),
            "target": _lists(pa.array(targets.reshape(-1).numpy()), n),
        },
        schema=SCHEMAS["condensed"],
    )


def _lists(flat: pa.Array, n: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1) * (len(flat) // n), pa.int32()), flat)
