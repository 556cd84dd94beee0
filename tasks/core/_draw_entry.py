# The entry that travels with a registered generator. It stands behind a copy of the files that define it.
import json
from pathlib import Path

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel
from safetensors.torch import load_file


class Served(PythonModel):
    """Labels (N,), int64, in; one image of each, (N, C, H, W), uint8, out. Parameter `seed`: the same draws the same images again."""

    def load_context(self, context):
        arch = json.loads(Path(context.artifacts["arch"]).read_text(encoding="utf-8"))
        self.net = build(arch)  # noqa: F821 (stands in the copied files above)
        self.net.load_state_dict(load_file(context.artifacts["weights"]))
        self.net.eval()

    def predict(self, context, model_input, params=None):
        labels = torch.from_numpy(np.ascontiguousarray(model_input))  # noqa: F821
        generator = torch.Generator().manual_seed(int((params or {}).get("seed") or 0))  # noqa: F821
        return self.net.draw(labels, generator=generator).numpy()


mlflow.models.set_model(Served())
