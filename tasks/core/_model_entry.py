# The entry that travels with a registered model. It stands behind a copy of `networks.py` and needs torch, safetensors and mlflow alone.
import json
from pathlib import Path

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel
from safetensors.torch import load_file


class Served(PythonModel):
    """Images (N, C, H, W), uint8, in; class probabilities (N, classes), float32, out.

    Parameter `point`, where the signature has it: the path that this call takes through the network.
    """

    def load_context(self, context):
        arch = json.loads(Path(context.artifacts["arch"]).read_text(encoding="utf-8"))
        self.net = build(arch)  # noqa: F821 (stands in the copied file above)
        self.net.load_state_dict(load_file(context.artifacts["weights"]))
        self.net.eval()

    def predict(self, context, model_input, params=None):
        images = torch.from_numpy(np.ascontiguousarray(model_input)).float() / 255  # noqa: F821
        chosen = {"point": int(params["point"])} if params and params.get("point") is not None else {}
        with torch.no_grad():  # noqa: F821
            return self.net(images, **chosen).softmax(1).numpy()


mlflow.models.set_model(Served())
