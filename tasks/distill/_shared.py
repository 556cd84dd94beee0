"""What the distillers share: a student and its recipe, what the teachers say of each row, the loop, and checks of what they are given."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core import loop, networks
from tasks.core.dataset import CACHE_FROM_ROWS, Dataset, Info
from tasks.core.errors import UserError
from tasks.core.method import MethodConfig
from tasks.core.networks import Net
from tasks.core.progress import track
from tasks.core.settings import project

Images = npt.NDArray[np.uint8]
AT_ONCE = 1024  # rows of one forward pass of a teacher


class Student(MethodConfig):
    """The student and how it is trained. The defaults keep it under a quarter of the default teacher at every image size from 8 to 32."""

    widths: tuple[int, ...] = Field((16, 32), min_length=1, description="channels of each convolution of a fresh student")
    hidden: int = Field(48, ge=1, description="features before a fresh student's last layer")
    steps: int = Field(800, ge=1, description="batches of the main stage")
    batch: int = Field(64, ge=1)
    lr: float = Field(0.1, gt=0, description="peak learning rate of SGD")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    shift: int = Field(0, ge=0, le=4, description="pixels by which images are moved at random, for student and teachers alike")

    def for_fit(self) -> dict[str, Any]:
        """Keyword arguments of `fit`."""
        return self.model_dump(include={"steps", "batch", "lr", "momentum", "weight_decay", "shift"})


class Answers:
    """What the teachers say of batches of some images: looked up where these stay as they are, asked anew where they are moved."""

    def __init__(self, teachers: Sequence[Net], data: Dataset, images: Images, *, shift: int = 0, device: str = "cpu") -> None:
        """`images` (N, C, H, W) are those of `data`; `shift` is that of `fit`."""
        self.teachers = [frozen(net, device) for net in teachers] if shift else []
        self.known = [] if shift else answers(teachers, data, images, device)
        self.device = device

    def __call__(self, at: Tensor, seen: Tensor) -> Tensor:
        """Logits (M, n, K) of the M teachers for the rows at positions `at` (n,), which now look like `seen` (n, C, H, W) in [0, 1]."""
        if self.known:
            rows = at.numpy()
            told = [torch.from_numpy(logits[rows]).to(self.device) for logits in self.known]
            return told[0][None] if len(told) == 1 else torch.stack(told)
        return asked(self.teachers, seen)


def answers(teachers: Sequence[Net], data: Dataset, images: Images, device: str = "cpu") -> list[npt.NDArray[np.float32]]:
    """Each teacher's logits (N, K) for the images (N, C, H, W) of `data`.

    Of many rows of a project they are kept in memory-mapped files beside the decoded images: further students of the same teachers on
    the same rows find them there.
    """
    where = _folder(data) if len(images) >= CACHE_FROM_ROWS else None
    if where is None:
        return [loop.predict(net, images, device=device).numpy() for net in teachers]
    return [_kept(net, images, where / f"{data.md5}-{_digest(net)}.npy", device) for net in teachers]


@torch.no_grad()
def asked(teachers: Sequence[Net], seen: Tensor) -> Tensor:
    """Logits (M, n, K) of the teachers for images (n, C, H, W) in [0, 1]."""
    return torch.stack([net(seen) for net in teachers])


def log_mean(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logarithm (n, K) of the mean over M teachers of their probabilities at a temperature; logits (M, n, K)."""
    logs = F.log_softmax(logits / temperature, 2)
    return logs[0] if len(logs) == 1 else torch.logsumexp(logs, 0) - np.log(len(logs))


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of each row (n,), of log-probabilities (n, K). What p holds for impossible adds nothing."""
    # xlogy's rule: a term with p = 0 is 0, also where its logarithm is -inf
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats over those of the rows (N, K) that have a label (N,), not -1; 0 where none has."""
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / max(int((labels >= 0).sum()), 1)


def peers(teachers: Sequence[Net]) -> list[Net]:
    """A fresh network of each teacher's description, which has learnt nothing. Call it inside `loop.seeded`."""
    return [networks.build(net.arch) for net in teachers]


def fit(
    net: nn.Module,
    images: Images,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    batch: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    generator: torch.Generator,
    shift: int = 0,
    device: str = "cpu",
    what: str = "distil",
    adam: bool = False,
) -> None:
    """Train in place by SGD, or Adam, with a one-cycle schedule; several networks that learn together are one module that holds them.

    `loss(seen, at)` is that of a batch: the images `seen` (n, C, H, W) in [0, 1] of the rows at positions `at` (n,). The network stays on
    the device, in training mode. Raises UserError where training diverged.
    """
    net.to(device).train()
    learning = [weights for weights in net.parameters() if weights.requires_grad]
    optimiser: torch.optim.Optimizer = (
        torch.optim.Adam(learning, lr, (momentum, 0.999), weight_decay=weight_decay)
        if adam
        else torch.optim.SGD(learning, lr, momentum, weight_decay=weight_decay)
    )
    schedule = loop.one_cycle(optimiser, lr, steps)
    batches = loop.index_batches(len(images), batch, steps, generator)
    for _ in track(range(steps), what):
        at = next(batches)
        rows = images[at.numpy()]
        value = loss(loop.to_float(moved(rows, shift, generator) if shift else rows, device), at)
        optimiser.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    loop.check_finite(net, what, lr)


def moved(images: Images, shift: int, generator: torch.Generator) -> Images:
    """Each image (N, C, H, W) moved by up to `shift` pixels in each direction, edges repeated."""
    n, channels, height, width = images.shape
    # `np.pad` takes as long as all of this
    padded = np.empty((n, channels, height + 2 * shift, width + 2 * shift), np.uint8)
    inside, bottom, right_side = padded[:, :, shift : shift + height], shift + height, shift + width
    inside[..., shift:right_side] = images
    inside[..., :shift], inside[..., right_side:] = images[..., :1], images[..., -1:]
    padded[:, :, :shift], padded[:, :, bottom:] = inside[:, :, :1], inside[:, :, -1:]
    down, right = torch.randint(0, 2 * shift + 1, (2, n), generator=generator).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    return np.asarray(windows[np.arange(n), :, down, right])


def begun(start: Net | None, images: Images, info: Info, *, widths: tuple[int, ...], hidden: int) -> Net:
    """The student: a copy of `start`, or a fresh `ConvNet` for the images (N, C, H, W). Call it inside `loop.seeded`."""
    if start is not None:
        return copy.deepcopy(start).requires_grad_(True)
    mean, std = loop.pixel_stats(images)
    return networks.convnet(info.shape, len(info.classes), widths=widths, hidden=hidden, mean=mean, std=std)


def frozen(net: Net, device: str = "cpu") -> Net:
    """A copy on the device that answers only: in evaluation mode, without gradients."""
    return copy.deepcopy(net).to(device).eval().requires_grad_(False)


def check(teachers: Sequence[Net], data: Dataset, start: Net | None = None) -> None:
    """Raises UserError where there is no teacher or no row, or a teacher or the student takes other images or classes than the data has."""
    if not teachers:
        raise UserError("distillation needs at least one teacher, got none")
    if len(data) == 0:
        raise UserError("there is nothing to distil on: the data has no rows")
    ours = (tuple(data.info.shape), len(data.info.classes))
    named = [(f"teacher {at}", net) for at, net in enumerate(teachers)] + ([("the student to start from", start)] if start else [])
    for name, net in named:
        theirs = (tuple(net.arch["shape"]), net.arch["classes"])
        if theirs != ours:
            raise UserError(f"{name} takes images {theirs[0]} of {theirs[1]} classes; the data has {ours[0]} and {ours[1]}")


def labelled(data: Dataset, why: str) -> Dataset:
    """The rows that have a label. Raises UserError where there is none; `why` says what wants them."""
    rows = data.where(data.labels() >= 0)
    if len(rows) == 0:
        raise UserError(f"no row of the data has a label: {why}")
    return rows


def _folder(data: Dataset) -> Path | None:
    try:
        return project(data.parts[0].folder).cache / "answers"
    except UserError:  # the rows lie in no project
        return None


def _kept(net: Net, images: Images, path: Path, device: str) -> npt.NDArray[np.float32]:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.stem}.{os.getpid()}.npy")
        array = np.lib.format.open_memmap(fresh, mode="w+", dtype=np.float32, shape=(len(images), int(net.arch["classes"])))
        for start in range(0, len(images), AT_ONCE):
            array[start : start + AT_ONCE] = loop.predict(net, images[start : start + AT_ONCE], device=device).numpy()
        array.flush()
        fresh.replace(path)
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def _digest(net: Net) -> str:
    total = hashlib.sha256(repr(net.arch).encode())
    for value in net.state_dict().values():
        total.update(value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:32]
