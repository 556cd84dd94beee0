"""MLflow as the store: steps that are done, models, evidence, versions and aliases. Always by explicit run and model ids.

A step's run carries `retort.key` from its start and `retort.done`, the same key, as the last thing written. So a run without the second
was cut off: `sweep` removes it. The result of a step stands in its tag `retort.result`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from tasks.core import files
from tasks.core.errors import UserError
from tasks.core.refs import DataRef, ModelRef
from tasks.core.settings import Settings

EXPERIMENT = "retort"


QUIET = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "DO_NOT_TRACK": "true",
}


def environment(settings: Settings) -> dict[str, str]:
    """The environment that MLflow must run in: no pickle, no telemetry, no progress bars."""
    return {"MLFLOW_TRACKING_URI": settings.tracking_uri, **QUIET}


class Store:
    """One project's tracking store and registry. `Store(settings)` makes them where they are not there yet."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        os.environ.update(environment(settings))
        prepare(settings)
        import mlflow

        mlflow.set_tracking_uri(settings.tracking_uri)
        mlflow.set_registry_uri(settings.tracking_uri)
        # by name: the two above are the whole process's, and another store may set them
        self.client = mlflow.MlflowClient(settings.tracking_uri, settings.tracking_uri)
        self._experiments: dict[str, str] = {}
        self.project = _project_id(settings)

    # steps

    def find(self, key: str) -> dict[str, Any] | None:
        """The result of the finished step with this key, or None."""
        experiment = self.experiment()
        runs = self.client.search_runs([experiment], f"tags.`retort.done` = '{key}'", max_results=1)
        if not runs:
            return None
        result: dict[str, Any] = json.loads(runs[0].data.tags["retort.result"])
        return {**result, "run_id": runs[0].info.run_id}

    def newest_run(self, tags: Mapping[str, str], *, like: bool = False) -> str | None:
        """The id of the last run that ended well and has these tags, or with `like` tags of these patterns (SQL's, with %); or None."""
        wanted = " and ".join(f"tags.`{name}` {'LIKE' if like else '='} '{value}'" for name, value in tags.items())
        found = self.client.search_runs([self.experiment()], f"{wanted} and attributes.status = 'FINISHED'", max_results=1)
        return found[0].info.run_id if found else None

    def start(self, key: str, name: str, *, params: Mapping[str, Any], tags: Mapping[str, str], inputs: Sequence[DataRef]) -> str:
        """Begin a step's run and give its id."""
        from mlflow.entities import Dataset as Logged
        from mlflow.entities import DatasetInput

        run = self.client.create_run(self.experiment(), run_name=name, tags={"retort.key": key, "retort.project": self.project, **tags})
        run_id: str = run.info.run_id
        for param, value in params.items():
            self.client.log_param(run_id, param, value)
        logged = [Logged(name=ref.path, digest=ref.md5[:36], source_type="dvc", source=ref.model_dump_json()) for ref in inputs]
        if logged:
            self.client.log_inputs(run_id, [DatasetInput(item, tags=[]) for item in logged])
        return run_id

    def finish(self, run_id: str, key: str, result: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """End a step's run well: its metrics, its result, and last the mark that it is done."""
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        known = [Metric(name, float(value), now, 0) for name, value in metrics.items() if value == value]
        self.client.log_batch(run_id, metrics=known, tags=[RunTag("retort.result", json.dumps(result))])
        self.client.set_terminated(run_id, "FINISHED")
        self.client.set_tag(run_id, "retort.done", key)

    def fail(self, run_id: str) -> None:
        """End a step's run badly."""
        self.client.set_terminated(run_id, "FAILED")

    def sweep(self) -> int:
        """Remove what steps that were cut off have left, models without an end included. Give the number of runs removed.

        Only for the holder of the project's lock: then no step of this project is running.
        """
        experiment = self.experiment()
        cut_off = [
            run
            for run in self.client.search_runs([experiment], "attributes.status != 'FAILED'")
            if run.data.tags.get("retort.project") == self.project and "retort.done" not in run.data.tags
        ]
        for run in cut_off:
            for model in self.client.search_logged_models([experiment], filter_string=f"source_run_id = '{run.info.run_id}'"):
                self.client.delete_logged_model(model.model_id)
                if model.artifact_location.startswith("file:"):
                    shutil.rmtree(Path(url2pathname(urlparse(model.artifact_location).path)).parent, ignore_errors=True)
            self.client.delete_run(run.info.run_id)
        return len(cut_off)

    # artifacts

    def log_json(self, run_id: str, name: str, values: Any) -> None:
        """Store plain values as an artifact of a run."""
        self.client.log_dict(run_id, values, name)

    def log_text(self, run_id: str, name: str, text: str) -> None:
        """Store text as an artifact of a run."""
        self.client.log_text(run_id, text, name)

    def log_file(self, run_id: str, path: Path) -> None:
        """Store a file as an artifact of a run, under its own name."""
        self.client.log_artifact(run_id, str(path))

    def artifact(self, run_id: str, name: str) -> Path:
        """A local path of a run's artifact."""
        import mlflow

        return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name, tracking_uri=self.settings.tracking_uri))

    # models

    def log_net(self, run_id: str, net: Any, *, name: str, classes: Sequence[str], tags: Mapping[str, str]) -> ModelRef:
        """Store a network as an MLflow model that any client can serve without this package."""
        import mlflow.pyfunc
        from mlflow.models import Model

        from tasks.core import served

        with tempfile.TemporaryDirectory() as folder:
            packed = served.pack(net, classes, Path(folder))
            sha256 = _sha256(Path(packed["artifacts"]["weights"]))
            made = self.client.create_logged_model(self.experiment(), name, run_id, tags={**tags, "retort.sha256": sha256})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it asks for type hints that would shut out tensors
                Model.log(
                    artifact_path=None,
                    flavor=mlflow.pyfunc,
                    name=name,
                    run_id=run_id,
                    model_id=made.model_id,
                    **packed,
                )
        return ModelRef(model_id=made.model_id, run_id=run_id, sha256=sha256)

    def role(self, ref: ModelRef) -> str:
        """The role that a model was made for, such as `teacher`; of an unlearned or retrained one that of the model that it replaces."""
        tags = self.client.get_run(ref.run_id).data.tags
        before = json.loads(tags.get("retort.inputs", "{}")).get("model")
        if before is None:
            return str(tags.get("retort.role", ""))
        return self.role(ModelRef(**{key: value for key, value in before.items() if key != "kind"}))

    def has_net(self, ref: ModelRef) -> bool:
        """Whether a model's weights are still there, where they are files of this machine; elsewhere they are taken to be."""
        from mlflow.exceptions import MlflowException

        try:
            place = urlparse(self.client.get_logged_model(ref.model_id).artifact_location)
        except MlflowException:
            return False
        return place.scheme != "file" or Path(url2pathname(place.path), "artifacts", "weights.safetensors").is_file()

    def arch(self, ref: ModelRef) -> dict[str, Any]:
        """The description of a model's network, `class_names` included. Raises UserError where its files are gone."""
        found: dict[str, Any] = json.loads((self._files(ref) / "arch.json").read_text(encoding="utf-8"))
        return found

    def reads(self, ref: ModelRef) -> bool:
        """Whether a model takes texts; no, where its files are gone."""
        from tasks.core.networks import reads

        try:
            return reads(self.arch(ref))
        except UserError:
            return False

    def _files(self, ref: ModelRef) -> Path:
        import mlflow

        try:
            return Path(mlflow.artifacts.download_artifacts(ref.uri)) / "artifacts"
        except (mlflow.exceptions.MlflowException, OSError) as error:
            raise UserError(f"model {ref.model_id} cannot be loaded: {error}") from None

    def load_net(self, ref: ModelRef) -> Any:
        """Load a model back as a trainable network. Raises UserError where its weights are gone or are not those that were stored."""
        from safetensors.torch import load_file

        from tasks.core import networks

        folder = self._files(ref)
        weights = folder / "weights.safetensors"
        if not weights.is_file() or _sha256(weights) != ref.sha256:
            raise UserError(f"the weights of model {ref.model_id} are not those that were registered; restore {weights}, or retrain")
        arch = json.loads((folder / "arch.json").read_text(encoding="utf-8"))
        arch.pop("class_names", None)
        net = networks.build(arch)
        net.load_state_dict(load_file(weights))
        return net.eval()

    # registry

    def register(self, name: str, ref: ModelRef, tags: Mapping[str, str]) -> int:
        """The version of `name` that holds this model: the one there is, or a new one, tagged from its first moment."""
        if not self.known(name):
            self.client.create_registered_model(name)
        if (there := self.version_of(name, ref)) is not None:
            return there
        stamped = {"retort.model": ref.model_id, "retort.run": ref.run_id, "retort.sha256": ref.sha256, **tags}
        made = self.client.create_model_version(name, source=ref.uri, run_id=ref.run_id, tags=stamped, model_id=ref.model_id)
        return int(made.version)

    def describe(self, name: str, version: int, text: str) -> None:
        """Set a version's description, which MLflow's page shows as Markdown."""
        self.client.update_model_version(name, str(version), description=text)

    def tag(self, name: str, version: int, key: str, value: str) -> None:
        """Set a tag of a version."""
        self.client.set_model_version_tag(name, str(version), key, value)

    def version_of(self, name: str, ref: ModelRef) -> int | None:
        """The version of `name` that holds this model, or None."""
        found = self.client.search_model_versions(f"name = '{name}' and tags.`retort.model` = '{ref.model_id}'", max_results=1)
        return int(found[0].version) if found else None

    def model_runs(self) -> list[tuple[str, dict[str, str]]]:
        """Every finished run that made a model, registered or not, with its tags; the oldest first."""
        found, token, order = [], None, ["attributes.start_time ASC"]
        while True:
            page = self.client.search_runs(
                [self.experiment()], "tags.`retort.seen` LIKE '%'", max_results=1000, order_by=order, page_token=token
            )
            found += [(run.info.run_id, dict(run.data.tags)) for run in page if "retort.done" in run.data.tags]
            if not (token := page.token):
                return found

    def versions_by_model(self) -> dict[str, list[tuple[str, int, bool]]]:
        """The registered versions of each model, by its id: name, number, and whether it is revoked."""
        found: dict[str, list[tuple[str, int, bool]]] = {}
        for version in self.all_versions():
            revoked = version.tags.get("revoked", "false") != "false"
            found.setdefault(version.tags["retort.model"], []).append((version.name, int(version.version), revoked))
        return found

    def all_versions(self) -> Iterator[Any]:
        """The versions of every registered model that this project's flows made."""
        token = None
        while True:
            page = self.client.search_model_versions("tags.`retort.model` LIKE '%'", max_results=1000, page_token=token)
            yield from page
            if not (token := page.token):
                return

    def versions_of(self, ref: ModelRef) -> list[tuple[str, int]]:
        """Every version that holds this model, as name and number."""
        found = self.client.search_model_versions(f"tags.`retort.model` = '{ref.model_id}'")
        return [(version.name, int(version.version)) for version in found]

    def version(self, name: str, number: int) -> Any:
        """One version that this project's flows made, or None."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_model_version(name, str(number))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return found if "retort.model" in found.tags else None

    def newest(self, name: str) -> int | None:
        """The newest version that this project's flows made and that is not revoked, or None."""
        if not self.known(name):
            return None
        # of versions alone: others may have put some there that are not ours
        for found in self.client.search_model_versions(f"name = '{name}'", order_by=["version_number DESC"], max_results=100):
            if "retort.model" in found.tags and found.tags.get("revoked", "false") == "false":
                return int(found.version)
        return None

    def versions(self, name: str) -> list[Any]:
        """The versions of a registered model that this project's flows made, the oldest first; none for an unknown name."""
        if not self.known(name):
            return []
        found = [version for version in self.client.search_model_versions(f"name = '{name}'") if "retort.model" in version.tags]
        return sorted(found, key=lambda version: int(version.version))

    def known(self, name: str) -> bool:
        """Whether there is a registered model of this name."""
        from mlflow.exceptions import MlflowException

        try:
            return bool(self.client.get_registered_model(name).name == name)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return False
            raise

    def names(self) -> list[str]:
        """Names of the registered models, sorted."""
        names, token = [], None
        while True:
            page = self.client.search_registered_models(page_token=token)
            names += [model.name for model in page]
            if not (token := page.token):
                return sorted(names)

    def aliases(self, name: str) -> dict[str, int]:
        """Aliases of a registered model and the versions that they stand for."""
        return {alias: int(version) for alias, version in self.client.get_registered_model(name).aliases.items()}

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Let an alias stand on a version. Raises UserError where it does not stand there afterwards."""
        self.client.set_registered_model_alias(name, alias, str(version))
        if self.aliases(name).get(alias) != version:
            raise UserError(f"alias {alias!r} of {name} could not be set to version {version}: something else moves it")

    def delete_alias(self, name: str, alias: str) -> None:
        """Take an alias away."""
        self.client.delete_registered_model_alias(name, alias)

    @property
    def embedded(self) -> bool:
        """Whether the registry is this project's own, also behind the server of `retort up`, and not one that others share."""
        return self.settings.owns_store

    def smoke_check(self, name: str, alias: str) -> None:
        """Load a version through the registry as any client would and have it answer. Raises UserError where it does not."""
        import mlflow

        from tasks.core import served

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it asks for type hints that would shut out tensors
                model = mlflow.pyfunc.load_model(f"models:/{name}@{alias}")
            served.check_answer(model)
        except Exception as error:  # whatever a client would meet
            raise UserError(f"it cannot be served: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from None

    def version_ref(self, name: str, version: int | str) -> ModelRef:
        """The model that a version or an alias stands for. Raises UserError that lists what there is."""
        if not self.known(name):
            raise UserError(f"there is no registered model {name!r}; there are: {', '.join(self.names()) or 'none, run `retort run`'}")
        aliases = self.aliases(name)
        number = aliases.get(str(version), int(version) if str(version).isdigit() else None)
        found = self.version(name, number) if number is not None else None
        if found is not None:
            tags = found.tags
            return ModelRef(model_id=tags["retort.model"], run_id=tags["retort.run"], sha256=tags["retort.sha256"])
        known = [*aliases, *(str(found.version) for found in self.versions(name)[-20:])]
        raise UserError(f"{name} has no version or alias {version!r}; it has {', '.join(known)}")

    def experiment(self, name: str = EXPERIMENT) -> str:
        """The id of an experiment whose artifacts lie in the project, made on first use."""
        from mlflow.exceptions import MlflowException

        if name not in self._experiments:
            found, root = self.client.get_experiment_by_name(name), self.settings.artifact_root
            if found is None:
                try:
                    self.client.create_experiment(name, artifact_location=f"{root}/{name}" if root else None)
                except MlflowException as error:  # another process was first
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                found = self.client.get_experiment_by_name(name)
                assert found is not None
            self._experiments[name] = found.experiment_id
        return self._experiments[name]


def _project_id(settings: Settings) -> str:
    """A name for this copy of the project: on a shared server, other copies have steps of their own at work."""
    path = settings.home / "project-id"
    if not path.exists():
        files.write_text(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8")


def prepare(settings: Settings) -> None:
    """Make the embedded database. Ten seconds once; it appears under its name only when it is whole."""
    if settings.tracking_uri != f"sqlite:///{settings.mlflow_db}" or settings.mlflow_db.exists():
        return
    settings.home.mkdir(parents=True, exist_ok=True)
    with files.exclusive(settings.home / "mlflow.lock"):
        if settings.mlflow_db.exists():
            return
        from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine_with_retry

        for left in settings.home.glob("mlflow.new-*"):
            left.unlink()
        fresh = settings.home / f"mlflow.new-{os.getpid()}.db"
        engine = create_sqlalchemy_engine_with_retry(f"sqlite:///{fresh}")
        _initialize_tables(engine)
        engine.dispose()
        fresh.replace(settings.mlflow_db)


def _sha256(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
