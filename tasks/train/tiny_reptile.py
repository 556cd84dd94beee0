"""An initialisation that a tiny device fits to itself with a few samples: devices learn online, the server follows them a part of the way.

Paper   TinyReptile: TinyML with Federated Meta-Learning (2023), arXiv 2304.05201; On-device Online Learning (2024), arXiv 2405.07601
Idea    one device a round: theta = phi; its stream, one SGD step for each sample (batch 1, nothing stored);
        phi += alpha (theta - phi), with alpha falling to 0. Deployed, phi takes the same few online steps
Small   devices are simulated: each draws a few classes, a few rows of each, and a sensor with a gain and an offset of its own. The paper
        measures memory and energy on microcontrollers, and asks for half of what its baselines take
Limits  Fashion-MNIST, 1,000 devices of 3 classes x 5 rows, each numbering its classes itself; accuracy on new devices after 15 online
        samples, 5 seeds: .766 (joint training on the pooled streams .500, first weights .449). Where labels mean the same everywhere it
        is as good as joint training and no better (.869, .864). Features of a network trained on pooled rows with their true names, with
        an empty head, reach .888: where names can be pooled, pool them. One device a round is noisy (.72 to .79 by seed), and 2,500
        were no better than 1,000. The rate of the online steps matters: take the one that the devices took, or half. 10 s of one core
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.method import method
from tasks.core.networks import Net
from tasks.core.progress import track
from tasks.train._shared import Fleet, decayed, draw_stream, first_network, learn_online, pool_of


class Config(Fleet):
    """Settings."""

    lr: float = Field(0.05, gt=0, description="learning rate of a device's steps")
    step: float = Field(0.3, gt=0, le=1, description="how far the server follows a device at first (alpha)")


SMOKE = Config(rounds=20, ways=3, shots=2, widths=(4,), hidden=8)


@method(
    paper="TinyReptile: TinyML with Federated Meta-Learning (2023)",
    arxiv="2304.05201",
    claim="after the same few online steps on new devices its initialisation beats one trained jointly on the pooled rows",
)
def tiny_reptile(data: Dataset, cfg: Config = Config(), *, start: Net | None = None, seed: int = 0, device: str = "cpu") -> Net:
    """An initialisation learnt on simulated devices that hold the labelled rows of `data`; on from a copy of `start` where one is given.

    With labels `slots` it has `ways` outputs, which mean nothing before a device has trained them.
    Raises UserError where too few classes have rows, `start` does not fit, or training diverged.
    """
    pool = pool_of(data, cfg.ways)
    with loop.seeded(seed) as generator:
        net = first_network(pool, data, start, ways=cfg.ways, labels=cfg.labels, widths=cfg.widths, hidden=cfg.hidden)
        net.to(device).train()
        weights = list(net.parameters())
        devices = cfg.model_dump(include={"ways", "shots", "labels", "gain", "offset"})
        for at in track(range(cfg.rounds), "devices"):
            stream = draw_stream(pool, **devices, generator=generator, device=device)
            server = [value.detach().clone() for value in weights]
            learn_online(net, stream, cfg.lr)
            for value, before in zip(weights, server, strict=True):
                value.data = follow(before, value.data, decayed(cfg.step, at, cfg.rounds))
    loop.check_finite(net, "devices", cfg.lr)
    return net.cpu().eval()


def follow(server: Tensor, device: Tensor, step: float) -> Tensor:
    """The server's weights, moved towards the device's: phi + step (theta - phi) (Reptile's rule; not an average of models)."""
    return server + step * (device - server)
