"""What travels with a registered model: its weights, its description, and source enough for any client to use it without this package."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.core.networks import Net, draws, reads

HERE = Path(__file__).parent
NEEDS = ("torch", "safetensors", "numpy", "mlflow")
BESIDES = {  # what kinds of networks need besides
    "denoiser": ("diffusers", "transformers"), "text_denoiser": ("diffusers", "transformers"),
    "clip": ("transformers",), "text": ("transformers",),
}  # fmt: skip
TEXTS = ["a text to be told apart", "and another"]


def pack(net: Net, classes: Sequence[str], folder: Path) -> dict[str, Any]:
    """Write a network's files into a folder. Gives what MLflow must be told of them.

    A classifier takes images (N, C, H, W) uint8, or texts in the column `text`, and gives class probabilities (N, classes) float32; a
    generator takes labels (N,) int64 and the parameter `seed`, and gives images. The example is made of noise: real rows would stay alive
    in every copy of the model.
    """
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from safetensors.torch import save_file

    shape = tuple(net.arch["shape"])
    pictures, labels = TensorSpec(np.dtype("uint8"), (-1, *shape)), TensorSpec(np.dtype("int64"), (-1,))
    given: Any = pictures
    example: Any = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
    shares = TensorSpec(np.dtype("float32"), (-1, int(net.arch["classes"])))
    generator = draws(net.arch)
    if generator:
        given, example = labels, np.arange(2) % net.arch["classes"]
    elif reads(net.arch):
        given, example = ColSpec(DataType.string, "text"), pd.DataFrame({"text": TEXTS})
    params = [ParamSpec("seed", DataType.long, 0)] if generator else []
    if "points" in net.arch:  # a network with several paths: each request may name its own
        params = [ParamSpec("point", DataType.long, int(net.arch["point"]))]
    weights, arch, entry = folder / "weights.safetensors", folder / "arch.json", folder / "model_entry.py"
    save_file({key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}, weights)
    arch.write_text(json.dumps({**net.arch, "class_names": list(classes)}), encoding="utf-8")
    entry.write_text(source(net), encoding="utf-8")
    return {
        "python_model": str(entry),
        "artifacts": {"weights": str(weights), "arch": str(arch)},
        "signature": ModelSignature(
            params=ParamSchema(params) if params else None,  # type: ignore[arg-type]
            inputs=Schema([given]),
            outputs=Schema([pictures if generator else shares]),
        ),
        "input_example": example,
        "pip_requirements": [*NEEDS, *BESIDES.get(net.arch["kind"], ())],
    }


def source(net: Net) -> str:
    """The files that define a network, one after the other, and the entry that serves it: one file that imports nothing of this package."""
    own = [kind for kind in type(net).__mro__[::-1] if kind.__module__.startswith("tasks.core.")]
    files = dict.fromkeys(Path(inspect.getfile(kind)) for kind in own)
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    future = "from __future__ import annotations"
    kept = [line for line in lines if not line.startswith(("from tasks.core.", future))]
    entry = HERE / ("_draw_entry.py" if draws(net.arch) else "_text_entry.py" if reads(net.arch) else "_model_entry.py")
    known = f"KINDS[{net.arch['kind']!r}] = {type(net).__name__}"
    return "\n".join([future, *kept, "", known, "", entry.read_text(encoding="utf-8")])


def check_answer(model: Any) -> None:
    """Have a loaded model answer two requests of noise. Raises ValueError where it gives no probabilities, or no images."""
    import pandas as pd

    spec, shape = model.metadata.get_input_schema().inputs[0], model.metadata.get_output_schema().inputs[0].shape
    texts = model.metadata.get_input_schema().has_input_names()
    if not texts and len(spec.shape) == 1:
        answer = np.asarray(model.predict(np.zeros(2, np.int64)))
        if answer.dtype != np.uint8 or answer.shape != (2, *shape[1:]):
            raise ValueError(f"it answers two labels with {answer.dtype} of shape {answer.shape}, which are no images")
        return
    noise = pd.DataFrame({"text": TEXTS}) if texts else np.random.default_rng(0).integers(0, 256, (2, *spec.shape[1:]), dtype=np.uint8)
    answer = np.asarray(model.predict(noise))
    if answer.ndim != 2 or len(answer) != 2 or not np.allclose(answer.sum(1), 1, atol=1e-3):
        raise ValueError(f"it answers two requests with {answer.tolist()}, which are no class probabilities")
