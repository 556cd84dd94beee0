"""Compress a network by pruning, low rank, distilling, an early exit and 8-bit weights, alone or one after the other.

Paper   Model Compression and Efficient Inference for Large Language Models: A Survey (2024), arXiv 2402.09748
Idea    one representative of each of the survey's families, which `techniques` names in order. `prune_channels`: the channels and hidden
        units with the smallest L1 norm are cut out. `prune`: the smallest weights of the whole network become 0. `low_rank`: a singular
        value decomposition makes two thin layers of one. `kd`: what stands so far learns the teachers' probabilities, on all rows, and
        the labels; where it comes first, a fresh student does. `early_exit`: a head behind the first block answers what it is sure of,
        and the rest of the network is left out. `quantise`: weights are 8-bit integers with a scale for each output.
Small   ConvNets in place of language models; rounding to the nearest, without GPTQ's or Wanda's calibration; no 4-bit weights.
Limits  Fashion-MNIST, 8,000 labelled rows, 1,000 steps, 5 seeds, test: teacher 87.6% in 377 kB; .6 of the channels in 8 bits, 36 kB, 87.4;
        .3 of them in 32 bits, as many bytes, 86.8, on labels alone 86.3; 8 bits alone, 97 kB, 87.5; early exit, 440 kB and 30% of the
        multiply-adds, 87.8; two layers for one, 121 kB, 87.5; 80% of the weights 0, 87.5, in a file that is 377 kB until it is compressed:
        107 kB, and 32 in 8 bits. Weights that are 0 make no answer faster, and 8-bit ones a single row's slower, since they become floats
        where they are used: 0.17 ms against 0.13 on a CPU; half the channels 0.09, two layers 0.12, a row that leaves early 0.07.
        A quantised network can be trained on by its scales and biases alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tasks.core import loop, networks
from tasks.core.compact import Compact
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import Taught, method
from tasks.core.networks import ConvNet, Net
from tasks.distill import _shared
from tasks.distill._compress import low_rank, prune, prune_channels, quantised, with_exit, zeros_held
from tasks.distill._shared import Answers, Images, begun, check, cross_entropy, fit, frozen, kl, labelled, log_mean

Technique = Literal["prune_channels", "prune", "low_rank", "kd", "early_exit", "quantise"]


class Config(_shared.Student):
    """Settings. `widths` and `hidden` are those of a student that begins fresh; `steps` and `lr` those of each `kd` and of `early_exit`."""

    techniques: tuple[Technique, ...] = Field(("prune_channels", "kd", "quantise"), min_length=1, description="what is done, in this order")
    channels: float = Field(0.5, gt=0, le=1, description="share of the channels and hidden units that `prune_channels` keeps")
    sparsity: float = Field(0.8, gt=0, lt=1, description="share of the weights that `prune` makes 0")
    rank: float = Field(0.25, gt=0, le=1, description="rank that `low_rank` leaves, as a share of the full one")
    bits: Literal[8] = Field(8, description="of the weights that `quantise` leaves")
    exit_threshold: float = Field(0.9, gt=0, le=1, description="confidence from which the early head answers")
    temperature: float = Field(2.0, gt=0, description="at which teachers and student are compared")
    alpha: float = Field(0.5, ge=0, le=1, description="weight of the teachers' term where something learns; the labels' gets the rest")
    lr: float = Field(0.05, gt=0, description="peak learning rate of SGD")

    @field_validator("techniques")
    @classmethod
    def _can_follow(cls, techniques: tuple[Technique, ...]) -> tuple[Technique, ...]:
        once = [name for name in techniques if name != "kd"]
        if twice := next((name for name in once if once.count(name) > 1), None):
            raise ValueError(f"{twice} can be done once")
        if "quantise" in techniques[:-1]:
            raise ValueError("quantise comes last: integers are not trained, pruned or split")
        if "prune" in once and "low_rank" in once[once.index("prune") :]:
            raise ValueError("low_rank comes before prune: it would fill the zeros again")
        return techniques


SMOKE = Config(
    techniques=("prune_channels", "low_rank", "prune", "kd", "early_exit", "kd", "quantise"),
    widths=(8,), hidden=16, steps=10, batch=16, exit_threshold=0.2, shift=1,
)  # fmt: skip


def learnt(outputs: Sequence[Tensor], wanted: Tensor, labels: Tensor, temperature: float, alpha: float) -> Tensor:
    """Sum over heads of alpha * T^2 * KL(teachers || head) + (1 - alpha) * CE(labels, head) in nats, each the mean over the rows it takes.

    Logits (N, K) of each head; logarithms (N, K) of the teachers' probabilities at temperature T; labels (N,), -1: none.
    """

    def of(logits: Tensor) -> Tensor:
        soft = temperature**2 * kl(wanted, F.log_softmax(logits / temperature, 1)).mean()
        return alpha * soft + (1 - alpha) * cross_entropy(logits, labels)

    return torch.stack([of(logits) for logits in outputs]).sum()


def packed(net: Net) -> bytes:
    """The file that holds a network's weights."""
    return save({name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()})


def left_early(net: Compact, images: Images, device: str = "cpu") -> float:
    """Share of images (N, C, H, W) that the early head answers. Raises ValueError where there is none."""
    if net.early is None:
        raise ValueError("the network has no early head")
    net = loop.on(net, device)
    with torch.no_grad():
        sure = [
            net.both(loop.to_float(images[at : at + 1024], device))[1].softmax(1).amax(1) >= net.arch["exit"]
            for at in range(0, len(images), 1024)
        ]
    return float(torch.cat(sure).float().mean())


def counted(net: Net, images: Images, device: str = "cpu") -> tuple[Tensor, float]:
    """Logits (N, K), and the multiplications with an addition that one image (C, H, W) took on average."""
    with FlopCounterMode(display=False) as counter:
        logits = loop.predict(net, images, device=device)
    return logits, counter.get_total_flops() / 2 / len(images)


@method(
    paper="Model Compression and Efficient Inference for Large Language Models: A Survey (2024)",
    arxiv="2402.09748",
    claim="at the same bytes, fewer channels with 8-bit weights answer better than fewer channels alone",
)
def compression(
    teachers: Sequence[Net], data: Dataset, cfg: Config = Config(), *, start: Net | None = None, seed: int = 0, device: str = "cpu"
) -> Taught:
    """The first teacher, or a copy of `start`, compressed by the techniques in their order; where `kd` comes first, a fresh student.

    `kd` and `early_exit` learn from all teachers together, on all rows, and from the labels where there are any. Figures: `parameters`,
    `nonzero` (how many are not 0) and `sparsity` (share that is 0), `file_bytes` and `file_bytes_compressed` (by deflate),
    `multiply_adds` of a row, `teacher_file_bytes` and `teacher_multiply_adds` of the first teacher, `left_early` (share of rows),
    `agreement` with the first teacher, and on rows with a label, most of which a teacher knows, `accuracy_before` (the first teacher's)
    and `accuracy_after`. Raises UserError where there is no teacher, no row, they do not fit each other, the network is no `ConvNet` or
    is quantised already, or `alpha` is 0 and no row has a label to learn from.
    """
    check(teachers, data, start)
    images, labels = data.images(), torch.from_numpy(data.labels())
    base, fresh = start if start is not None else teachers[0], start is None and cfg.techniques[0] == "kd"
    if not fresh:
        _check_kind(base, "teacher 0" if start is None else "the student to start from")
    learns = {"kd", "early_exit"} & {*cfg.techniques}
    if learns and cfg.alpha == 0:
        labelled(data, "with 'alpha' 0 labels alone are learnt from; set 'alpha' above 0")
    said = Answers(teachers, data, images, shift=cfg.shift, device=device) if learns else None
    with loop.seeded(seed) as generator:
        net = cast(ConvNet, begun(None if fresh else base, images, data.info, widths=cfg.widths, hidden=cfg.hidden))

        def learn(part: nn.Module, outputs: Callable[[Tensor], Sequence[Tensor]], what: str) -> None:
            def loss(seen: Tensor, at: Tensor) -> Tensor:
                assert said is not None
                wanted = log_mean(said(at, seen), cfg.temperature)
                return learnt(outputs(seen), wanted, labels[at].to(device), cfg.temperature, cfg.alpha)

            fit(part, images, loss, **cfg.for_fit(), generator=generator, device=device, what=what)
            part.cpu()

        for at, name in enumerate(cfg.techniques):
            if name == "prune_channels":
                net = prune_channels(net, cfg.channels)
            elif name == "low_rank":
                net = low_rank(net, cfg.rank)
            elif name == "prune":
                prune(net, cfg.sparsity)
            elif name == "early_exit":
                net = with_exit(net, cfg.exit_threshold)
                learn(*_early(net, device), "early head")
            elif name == "kd":
                with zeros_held(net) if "prune" in cfg.techniques[:at] else nullcontext():
                    learn(net, partial(_heads, net), "distil")
            else:
                net = quantised(net)
        net = net.cpu().eval().requires_grad_(True)
    return Taught(net, _figures(net, teachers[0], images, labels.numpy(), device))


def _figures(net: Net, teacher: Net, images: Images, labels: npt.NDArray[np.int64], device: str) -> dict[str, float]:
    before, whole = counted(teacher, images, device)
    after, rest = counted(net, images, device)
    own, theirs = (logits.argmax(1).numpy() for logits in (after, before))
    values, nonzero = networks.parameters(net), sum(int(weights.count_nonzero()) for weights in net.parameters())
    file = packed(net)
    found = {"parameters": values, "nonzero": nonzero, "sparsity": 1 - nonzero / values, "file_bytes": len(file)}
    found |= {"file_bytes_compressed": len(zlib.compress(file)), "teacher_file_bytes": len(packed(teacher)), "multiply_adds": rest}
    found |= {"teacher_multiply_adds": whole, "agreement": float((own == theirs).mean())}
    if isinstance(net, Compact) and net.early is not None:
        found["left_early"] = left_early(net, images, device)
    if (known := labels >= 0).any():
        found |= {f"accuracy_{when}": float((said == labels)[known].mean()) for when, said in (("before", theirs), ("after", own))}
    return found


def _heads(net: Net, seen: Tensor) -> list[Tensor]:
    return net.both(seen) if isinstance(net, Compact) else [net(seen)]


def _early(net: Compact, device: str) -> tuple[nn.Linear, Callable[[Tensor], list[Tensor]]]:
    """The early head, which is to learn, and what it says of images; the block before it stays as it is."""
    assert net.early is not None
    head, before = net.early, cast(Compact, frozen(net, device))
    return head, lambda seen: [head(before.begin(seen).flatten(1))]


def _check_kind(net: Net, name: str) -> None:
    kind = net.arch["kind"]
    if kind not in ("convnet", "compact"):
        raise UserError(
            f"{name} is a network of kind {kind!r}; compression takes a 'convnet', or a student of it: begin the techniques with kd"
        )
    if net.arch.get("bits"):
        raise UserError(
            f"{name} is quantised already: its integers cannot be trained, pruned or split; take the network that it was made of"
        )
