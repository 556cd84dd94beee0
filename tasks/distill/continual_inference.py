"""Distil into a network that answers a stream frame by frame, at a part of a clip's cost and exactly as it answers the clip.

Paper   Efficient Online Processing with Deep Neural Networks (2023), arXiv 2306.13474; Continual Transformers (2022), arXiv 2201.06268
Idea    the rows of an image are a stream. Convolutions over time keep their last frames, residual paths wait as long as these do, and the
        last block attends by the newest token alone to the kept keys and values (single-output); the first of several blocks updates
        all its outputs by the key that leaves and the one that comes (retroactive). Positions are learnt encodings used in turn, twice
        the window less one. The student learns as in distill.kd: T^2 * KL on all rows, cross-entropy on those with a label.
Small   rows of images stand for frames of video: a convolution over time sees a frame's width as well, as a 3D one sees an area. ST-GCN,
        strides in time and structured pruning adapters are left out. Scores of the
        retroactive attention are kept as float64, relative to a row's largest, and computed anew where subtraction eats them.
Limits  Fashion-MNIST, 2,000 labelled and 6,000 unlabelled rows, 1,000 steps, 5 seeds, test: 83.6% (sd 0.4), at the last rows of an endless
        stream 83.7, a ConvNet student 83.2. A step costs 18 times less than the clip, with two blocks 4.6 times; against the ConvNet, which
        must see the whole window again, 2 times. Time is another thing: one stream's step takes 0.30 ms and a clip 0.44, with two blocks
        0.89 and 0.64, the ConvNet 0.11; 256 streams side by side take 14 ms a step and 46 a clip. Steps and clips give one
        probability within 2e-6 and logits, which reach 17, within 1.4e-5 in float32; 1e-10 in float64. A learning rate of 0.02 costs
        13 to 21 points, and 0.01 costs 11 where the student is twice as wide (validation, one and two seeds).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from tasks.core import loop, networks
from tasks.core.continual import Continual
from tasks.core.dataset import Dataset, Info
from tasks.core.errors import UserError
from tasks.core.method import Taught, method
from tasks.core.networks import Net
from tasks.distill import _shared
from tasks.distill._shared import Answers, Images, check, cross_entropy, fit, labelled, log_mean
from tasks.distill.kd import soft_loss

CLIPS = 8  # of the data, one after the other: the stream on which steps are compared with clips


class Config(_shared.Student):
    """Settings. `widths` are those of convolutions over time, `hidden` is the size of a token."""

    widths: tuple[int, ...] = Field((16, 32), min_length=1, description="channels of the convolutions over time")
    deep: int = Field(1, ge=0, description="further convolutions of the last width, with a residual path")
    kernel: int = Field(3, ge=3, description="frames that a convolution sees; odd")
    heads: int = Field(4, ge=1, description="attention heads of a block")
    blocks: int = Field(1, ge=1, description="transformer blocks; with more than one, a step's cost is mostly theirs")
    lr: float = Field(0.005, gt=0, description="peak learning rate of Adam")
    weight_decay: float = Field(0.0, ge=0)
    temperature: float = Field(4.0, gt=0, description="at which teacher and student are compared")
    alpha: float = Field(0.9, ge=0, le=1, description="weight of the teacher's term; the labels' gets the rest")


SMOKE = Config(widths=(8,), hidden=16, deep=1, heads=2, blocks=2, steps=15, batch=16, shift=1)


def described(images: Images, info: Info, *, widths: tuple[int, ...], deep: int, kernel: int, hidden: int, heads: int, blocks: int) -> Net:
    """A fresh network for the images (N, C, H, W). Call it inside `loop.seeded`. Raises UserError where the settings make none."""
    mean, std = loop.pixel_stats(images)
    given = {"kind": "continual", "shape": list(info.shape), "classes": len(info.classes), "mean": round(mean, 6), "std": round(std, 6)}
    inner = {"widths": list(widths), "deep": deep, "kernel": kernel, "hidden": hidden, "heads": heads, "wide": 2 * hidden, "blocks": blocks}
    try:
        return networks.build({**given, **inner})
    except ValueError as error:
        raise UserError(f"these settings make no network for images of {info.shape[1]} rows: {error}") from None


def operations(net: Continual) -> tuple[int, int]:
    """Floating point operations (two for each multiply-add) of one clip, and of a step once the window is full; one stream."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = net.arch["shape"]
    clip = torch.zeros(1, *shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(clip)
    of_clip = counter.get_total_flops()
    stream = net.start_stream()
    for t in range(shape[1] + 1):
        net.step(stream, clip[:, :, t % shape[1]])
    with FlopCounterMode(display=False) as counter:
        net.step(stream, clip[:, :, 0])
    return of_clip, counter.get_total_flops()


@torch.no_grad()
def both_ways(net: Continual, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (M, K) of steps along the clips (N, C, H, W), one after the other, and of every window of them, called offline.

    M = (N - 1) * H + 1: there are no answers before the first window is full.
    """
    rows = clips.transpose(0, 1).flatten(1, 2)  # (C, N * H, W)
    stream = net.start_stream()
    said = [net.step(stream, rows[None, :, t]) for t in range(rows.shape[1])]
    windows = rows.unfold(1, clips.shape[2], 1).permute(1, 0, 3, 2)
    offline = [net(part, at) for part, at in zip(windows.split(256), torch.arange(len(windows)).split(256), strict=True)]
    return torch.cat([logits for logits in said if logits is not None]), torch.cat(offline)


def largest_difference(stepped: Tensor, offline: Tensor) -> float:
    """Largest absolute difference of a class probability between logits (M, K) and (M, K)."""
    return float((stepped.softmax(1) - offline.softmax(1)).abs().max())


@method(
    paper="Efficient Online Processing with Deep Neural Networks (2023), Continual Inference Networks",
    arxiv="2306.13474",
    claim="a step of the stream answers exactly as the clip that ends there does, for a tenth of its multiply-adds or less",
)
def continual_inference(
    teachers: Sequence[Net], data: Dataset, cfg: Config = Config(), *, start: Net | None = None, seed: int = 0, device: str = "cpu"
) -> Taught:
    """A student of the teachers' mean probabilities and of the labels, which also steps along streams; fresh or on from a copy of `start`.

    Figures: `flops_clip`, `flops_step`, `flops_ratio`, `largest_difference` of a probability between steps and windows of the first rows,
    and `frames_before`, the frames that a stream takes before its first answer. Raises UserError where there is no teacher, no data, they
    do not fit each other, the settings make no network for these images, `start` is of another kind, or `alpha` is 0 and no row has
    a label.
    """
    check(teachers, data, start)
    if start is not None and not isinstance(start, Continual):
        raise UserError(
            f"the student to start from is a {start.arch['kind']!r}; this method goes on from a 'continual' network, or from none"
        )
    if cfg.alpha == 0:
        labelled(data, "with 'alpha' 0 the student learns from labels alone; set 'alpha' above 0")
    images, labels = data.images(), torch.from_numpy(data.labels())
    said = Answers(teachers, data, images, shift=cfg.shift, device=device)
    with loop.seeded(seed) as generator:
        shape = cfg.model_dump(include={"widths", "deep", "kernel", "hidden", "heads", "blocks"})
        student = copy.deepcopy(start).requires_grad_(True) if start is not None else described(images, data.info, **shape)

        def loss(seen: Tensor, at: Tensor) -> Tensor:
            logits = student(seen)
            soft = soft_loss(logits, log_mean(said(at, seen), cfg.temperature), cfg.temperature)
            return cfg.alpha * soft + (1 - cfg.alpha) * cross_entropy(logits, labels[at].to(device))

        fit(student, images, loss, **cfg.for_fit(), generator=generator, device=device, adam=True)
        student.cpu().eval()
    assert isinstance(student, Continual)
    of_clip, of_step = operations(student)
    figures = {
        "flops_clip": float(of_clip),
        "flops_step": float(of_step),
        "flops_ratio": of_clip / of_step,
        "largest_difference": largest_difference(*both_ways(student, loop.to_float(images[:CLIPS]))),
        "frames_before": float(data.info.shape[1] - 1),
    }
    return Taught(student, figures)
