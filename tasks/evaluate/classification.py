"""Measure classifiers on the same labelled rows: accuracy, calibration, latency and size, and each row's answer for paired comparison.

Paper   none: the usual measures; calibration error after On Calibration of Modern Neural Networks (2017), arXiv 1706.04599
Idea    each model answers each test row once. From the answers come figures with intervals (Wilson for shares, bootstrap for means)
        and one row for each answer, with which two models can be compared sample by sample.
Small   nothing is left out.
Limits  latency is that of this machine in this minute and has no interval: on a busy one it reads up to three times high. It is a
        median: of a network that answers some rows early, the time of the more frequent kind. The estimated calibration error lies above
        the true one on few rows. Worst-class accuracy is a minimum and so leans low; its interval is that of the one class, as if it had
        been named before.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tasks.core import loop, metrics, networks
from tasks.core.dataset import Dataset
from tasks.core.evidence import Evidence
from tasks.core.method import MethodConfig, method
from tasks.core.metrics import Figure
from tasks.core.networks import Net
from tasks.core.progress import track
from tasks.evaluate._shared import Rows, labelled

PER_SAMPLE = pa.schema(
    [("model", pa.string()), ("sample_id", pa.string()), ("label", pa.int64()), ("predicted", pa.int64()), ("confidence", pa.float64())]
)


class Config(MethodConfig):
    """Settings."""

    bins: int = Field(15, ge=1, description="confidence bins of the calibration error")  # Guo et al. 2017: 15
    draws: int = Field(1000, ge=10, description="bootstrap draws behind an interval")
    repeats: int = Field(50, ge=1, description="timed forward passes behind a latency")


SMOKE = Config(draws=20, repeats=2)


@method(
    paper="On Calibration of Modern Neural Networks (2017): its calibration error; otherwise a baseline",
    arxiv="1706.04599",
    claim="a figure's 95% interval holds the figure of a large sample in about 95 of 100 small ones",
)
def classification(
    models: Mapping[str, Net], data: Mapping[str, Dataset], cfg: Config = Config(), *, seed: int = 0, device: str = "cpu"
) -> Evidence:
    """Figures of each model on the labelled rows of role `test`: `accuracy`, `worst_class_accuracy`, `ece`, `nll` (nats),
    `latency_ms_b1` and `latency_ms_b64` (ms of one forward pass), `parameters`, `size_bytes`.

    Raises UserError where there is no model, no labelled test row, or a model does not fit the data.
    """
    (rows,) = labelled(models, data, "test")
    names = data["test"].info.classes
    figures: dict[str, dict[str, Figure]] = {}
    details: dict[str, Any] = {"classes": list(names), "rows": len(rows), "per_class": {}, "confusion": {}, "reliability": {}}
    tables = []
    for model, net in zip(models, track(list(models.values()), "evaluate"), strict=True):
        logits = loop.predict(net, rows.inputs, device=device)
        predicted, confidence, losses = answers(logits, rows.labels)
        hits, classes = predicted == rows.labels, net.arch["classes"]
        figures[model] = {
            "accuracy": metrics.share(hits),
            "worst_class_accuracy": worst_class(rows.labels, predicted),
            "ece": metrics.calibration_error(confidence, hits, cfg.bins, seed=seed, draws=cfg.draws),
            "nll": metrics.mean(losses, seed=seed, draws=cfg.draws),
            "latency_ms_b1": latency(net, rows.inputs, 1, cfg.repeats, device),
            "latency_ms_b64": latency(net, rows.inputs, 64, cfg.repeats, device),
            "parameters": Figure.exact(networks.parameters(net)),
            "size_bytes": Figure.exact(size_bytes(net)),
        }
        accuracies = metrics.per_class_accuracy(rows.labels, predicted, classes)
        details["per_class"][model] = [None if np.isnan(value) else value for value in accuracies]
        details["confusion"][model] = metrics.confusion(rows.labels, predicted, classes).tolist()
        details["reliability"][model] = metrics.reliability(confidence, hits, cfg.bins)
        tables.append(table(model, rows, predicted, confidence))
    return Evidence(figures, {"test": data["test"].md5}, details, pa.concat_tables(tables))


def answers(
    logits: Tensor, labels: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Predicted class, its probability, and the negative log-likelihood of the label in nats, each (N,), of logits (N, K)."""
    logs = F.log_softmax(logits.double(), 1)
    best = logs.max(1)
    losses = F.nll_loss(logs, torch.from_numpy(np.array(labels)), reduction="none")
    return best.indices.numpy(), best.values.exp().numpy(), losses.numpy()


def worst_class(labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> Figure:
    """Lowest accuracy among the classes that have rows, with that class's Wilson interval."""
    shares = [metrics.share(predicted[labels == c] == c) for c in np.unique(labels)]
    return min(shares, key=lambda figure: figure.value)


def latency(net: Net, images: npt.NDArray[np.uint8], size: int, repeats: int, device: str = "cpu") -> Figure:
    """Median milliseconds of one forward pass over `size` images, after three that are not timed; rows repeat where they are too few.

    Each pass takes the next rows: a network may answer some of them sooner than others.
    """
    net = loop.on(net, device)
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    times = []
    with torch.inference_mode():
        for turn in range(3 + repeats):
            batch = loop.to_float(images[(turn * size + np.arange(size)) % len(images)], device)
            start = time.perf_counter()
            net(batch).cpu()  # fetching the answer waits for the device
            times.append(time.perf_counter() - start)
    for module, training in modes:
        module.training = training
    return Figure.exact(float(np.median(times[3:])) * 1000)


def size_bytes(net: Net) -> int:
    """Bytes of all weights and buffers, each in its own type."""
    return sum(values.numel() * values.element_size() for values in net.state_dict().values())


def table(model: str, rows: Rows, predicted: npt.NDArray[np.int64], confidence: npt.NDArray[np.float64]) -> pa.Table:
    """One row for each answer of a model."""
    columns = {"sample_id": rows.ids, "label": rows.labels, "predicted": predicted, "confidence": confidence}
    return pa.table({"model": [model] * len(rows), **columns}, schema=PER_SAMPLE)
