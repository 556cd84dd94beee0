# The entry that travels with a registered model of texts. It stands behind a copy of the files that define it.
import json
from pathlib import Path

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel
from safetensors.torch import load_file


class Served(PythonModel):
    """Texts in, the column `text`; class probabilities (N, classes), float32, out."""

    def load_context(self, context):
        arch = json.loads(Path(context.artifacts["arch"]).read_text(encoding="utf-8"))
        self.net = build(arch)  # noqa: F821 (stands in the copied files above)
        self.net.load_state_dict(load_file(context.artifacts["weights"]))
        self.net.eval()

    def predict(self, context, model_input, params=None):
        texts = model_input["text"].tolist() if hasattr(model_input, "columns") else [str(text) for text in np.ravel(model_input)]
        with torch.no_grad():  # noqa: F821
            return self.net(torch.from_numpy(self.net.fill(self.net.cut(texts)))).softmax(1).numpy()  # noqa: F821


mlflow.models.set_model(Served())
