"""The figures that the project promises, measured: `make bench`, or `python -m tests.benchmarks NAME...` for some of them.

Nothing here is a test: machines are noisy, so each figure is a ratio against a peer in the same run, or stands beside its bound to be read.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from tasks.core.settings import shared_data
from tests import workspace
from tests.workspace import environment

PYTHON = sys.executable


def timed(command: list[str], folder: Path) -> float:
    began = time.perf_counter()
    ran = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"{command} failed:\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}")
    return time.perf_counter() - began


def median(command: list[str], folder: Path, times: int = 5) -> float:
    return statistics.median(timed(command, folder) for _ in range(times))


def full_size() -> dict[str, object]:
    return yaml.safe_load((workspace.catalog.ROOT / "params.yaml").read_text(encoding="utf-8"))


def show(what: str, figure: str, bound: str) -> None:
    print(f"{what:<64} {figure:>18}   asked: {bound}", flush=True)


def main_job(place: Path) -> None:
    """The whole job from nothing, again with nothing changed, and the same methods in a plain script."""
    folder = workspace.make(place / "job", full_size())
    run = [PYTHON, "-m", "flows.cli", "run"]
    fresh = timed(run, folder)
    show("main job on digits, from nothing", f"{fresh:.1f} s", "150 s or less")
    show("again with nothing changed", f"{median(run, folder, 3):.1f} s", "12 s or less")
    plain = timed([PYTHON, "-m", "tests.benchmarks.plain", str(place / "plain")], _with_tests(folder))
    show("the same methods in a plain script", f"{plain:.1f} s", "")
    show("main job over plain script", f"{fresh / plain:.2f}", "1.25 or less")
    tree = json.loads(timed_output([PYTHON, "-m", "flows.cli", "lineage", "digits-student@champion", "--json"], folder))
    assert tree["kind"] == "model"
    _quality(folder)


def _quality(folder: Path) -> None:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/.retort/mlflow.db")
    runs = mlflow.search_runs(search_all_experiments=True, filter_string="tags.`retort.role` = 'evidence'", output_format="list")
    figures = json.loads(Path(mlflow.artifacts.download_artifacts(run_id=runs[0].info.run_id, artifact_path="evidence.json")).read_text())
    by = figures["figures"]
    teacher, student = by["teacher"], by["student"]
    show("teacher's accuracy on held-out digits", f"{teacher['accuracy']['value']:.4f}", "0.97 or more")
    show("student's accuracy over the teacher's", f"{student['accuracy']['value'] / teacher['accuracy']['value']:.4f}", "0.99 or more")
    show(
        "student's parameters over the teacher's", f"{student['parameters']['value'] / teacher['parameters']['value']:.3f}", "0.25 or less"
    )


def commands(place: Path) -> None:
    """How long the light commands take to answer."""
    folder = workspace.make(place / "commands", full_size())
    for words in (["--help"], ["methods"], ["methods", "--json"]):
        show(f"retort {' '.join(words)}", f"{median([PYTHON, '-m', 'flows.cli', *words], folder):.2f} s", "0.5 s or less")


def dvc_status(place: Path) -> None:
    """`dvc status` with nothing changed, against DVC on a one-stage project whose output is as large."""
    ours = workspace.make(place / "ours", workspace.smoke_params())
    dvc = [PYTHON, "-m", "dvc"]
    timed([*dvc, "repro"], ours)
    size = sum(p.stat().st_size for p in (ours / "data").rglob("*") if p.is_file())
    theirs = place / "theirs"
    theirs.mkdir()
    timed(["git", "init", "-q"], theirs)
    timed([*dvc, "init", "-q"], theirs)
    (theirs / "make.py").write_text(f"open('out.bin', 'wb').write(bytes({size}))\n")
    (theirs / "dvc.yaml").write_text("stages:\n  one:\n    cmd: python make.py\n    deps: [make.py]\n    outs: [out.bin]\n")
    timed([*dvc, "repro"], theirs)
    rounds = [(timed([*dvc, "status"], ours), timed([*dvc, "status"], theirs)) for _ in range(7)]
    ratio = statistics.median(a for a, _ in rounds) / statistics.median(b for _, b in rounds)
    show("dvc status, ours over a one-stage project of the same size", f"{ratio:.2f}", "1.2 or less")


def batches(place: Path) -> None:
    """Fashion-MNIST's 60,000 from Parquet to decoded, standardised batches: the first time, and from the mapped array."""
    import numpy as np
    import torch

    from tasks.core import loop
    from tasks.core.dataset import Dataset
    from tasks.pool import read

    folder = workspace.make(place / "batches", full_size())
    source = shared_data() / "fashion_mnist"
    read.read_pool(read.configure({"source": f"parquet:{source}"}), folder / "data" / "pool")
    data = Dataset.open(folder / "data" / "pool")
    train = data.where(~np.isin(data.column("split").to_numpy(zero_copy_only=False), ["test"]))

    def one_pass() -> float:
        began = time.perf_counter()
        images = train.images()
        with loop.seeded(0) as generator:
            for at in loop.index_batches(len(images), 256, len(images) // 256, generator):
                batch = (loop.to_float(images[at.numpy()]) - 0.286) / 0.353
        assert isinstance(batch, torch.Tensor)
        return len(images) / (time.perf_counter() - began)

    show("Parquet to training batches, first pass (decodes)", f"{one_pass():,.0f} images/s", "")
    show("Parquet to training batches, from the mapped array", f"{one_pass():,.0f} images/s", "40,000 images/s or more")


def memory(place: Path) -> None:
    """Peak memory of each data stage on a pool of 1,000,000 rows, made by repeating Fashion-MNIST under new ids."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(shared_data() / "fashion_mnist" / "train.parquet").select(["image", "label"])
    source = place / "million"
    source.mkdir()
    rng = np.random.default_rng(0)
    for part in range(20):
        rows = table.take(pa.array(rng.integers(0, len(table), 50_000)))
        ids = pa.array([f"m{part:02d}-{i:05d}" for i in range(50_000)])
        pq.write_table(rows.append_column("sample_id", ids), source / f"{part:02d}.parquet")
    params = full_size()
    params["pool"]["source"] = f"parquet:{source}"
    folder = workspace.make(place / "memory", params)
    for stage in ("pool", "filter", "condense", "generate"):
        name = stage if stage == "pool" else f"{stage}.{params[stage]['method']}"
        began = time.perf_counter()
        code = (
            "import re, sys; from pathlib import Path; from tasks.__main__ import main; status = main([sys.argv[1]]);"
            "print(re.search(r'VmHWM:\\s+([0-9]+)', Path('/proc/self/status').read_text())[1]); sys.exit(status)"
        )
        shown = timed_output([PYTHON, "-c", code, name], folder)
        peak = int(shown.split()[-1]) / 1024**2
        show(f"{stage} on 1,000,000 rows: peak memory, in {time.perf_counter() - began:.0f} s", f"{peak:.2f} GB", "1.5 GB or less")


def concurrent(place: Path) -> None:
    """Flows at once through the servers of `retort up`: what arrives, and in what time, on SQLite and on PostgreSQL."""
    from flows._server import free_port
    from tests.benchmarks import load
    from tests.servers import postgres

    def rounds(name: str, *words: str) -> None:
        folder = workspace.make(place / name, workspace.smoke_params())
        cli = [PYTHON, "-m", "flows.cli"]
        timed([*cli, "up", "--prefect-port", str(free_port()), "--mlflow-port", str(free_port()), *words], folder)
        try:
            load.measure(folder, 1, 1, "warm")
            one = 0.0
            for flows in (1, 8, 16, 32):
                found = load.measure(folder, flows, 3, f"n{flows}", timeout=900)
                one = one or found["seconds"]
                logs = "".join((folder / ".retort" / "logs" / f"{log}.log").read_text() for log in ("prefect", "mlflow"))
                lost = sum(found["lost"].values())
                figure = f"{flows / found['seconds']:.2f} flows/s, {len(found['errors'])} errors, {lost} lost"
                asked = "no error, nothing lost" if flows <= 8 else ""
                show(f"{name}, {flows} flows at once, {found['seconds']:.1f} s (one at a time {flows * one:.1f} s)", figure, asked)
                for error in sorted(set(found["errors"]))[:3]:
                    print(f"    {error[:200]}")
                print(f"    lost {found['lost']}; 'database is locked' in the servers' logs so far: {logs.count('database is locked')}")
        finally:
            timed([*cli, "down"], folder)

    rounds("SQLite")
    if postgres.binaries():
        with postgres.cluster() as address:
            rounds("PostgreSQL", "--database", address)


def registry(place: Path) -> None:
    """Promotion of an evaluated version, a refresh that finds nothing new, and both with 1,000 versions in the registry."""
    folder = workspace.make(place / "registry", full_size())
    timed([PYTHON, "-m", "flows.cli", "run"], folder)
    timed([PYTHON, "-m", "flows.cli", "refresh"], folder)
    show("refresh with nothing changed", f"{median([PYTHON, '-m', 'flows.cli', 'refresh'], folder, 3):.1f} s", "15 s or less")
    flow, whole = promotion(folder)
    show("promotion of an evaluated version: the flow", f"{flow:.2f} s", "3 s or less")
    show("the same as a command, with Prefect's start and torch's", f"{whole:.1f} s", "")
    thousand(folder)
    asked = {
        "lineage": (["digits-student/1"], "tasks.core.lineage import made_from as ask", "ask(here, 'digits-student/1')"),
        "fit": (["--device", "board"], "flows._find import fit as ask", "ask('board', '', ())"),
        "find-model": (["--data", "data/pool:reference"], "flows._find import find_model as ask", "ask('data/pool:reference', ())"),
    }
    for name, (words, source, question) in asked.items():
        first = timed([PYTHON, "-m", "flows.cli", name, *words], folder)
        alone = question_alone(folder, f"from {source}", question)
        show(f"1,000 versions: retort {name}, the question alone (first time {first:.1f} s)", f"{alone:.2f} s", "2 s or less")
        show("the same as a command", f"{median([PYTHON, '-m', 'flows.cli', name, *words], folder, 3):.2f} s", "")
    flow, whole = promotion(folder)
    show("1,000 versions: promotion of an evaluated version: the flow", f"{flow:.2f} s", "2 s or less")
    imports = median([PYTHON, "-c", "import mlflow.tracking, torch, prefect"], folder, 3)
    show("importing mlflow, torch and prefect alone", f"{imports:.2f} s", "")


def lineage(place: Path) -> None:
    """Everything that was made from one sample, in a large project; and the size of what a model says that it saw."""
    from tasks.core import seen
    from tests.benchmarks import descent

    folder = workspace.make(place / "lineage", workspace.smoke_params())
    sample = descent.fill(folder)
    command = [PYTHON, "-m", "flows.cli", "lineage", "--sample", sample, "--json"]
    first = timed(command, folder)
    found = json.loads(timed_output(command, folder))
    assert (len(found["data"]), len(found["models"])) == (descent.DATA_VERSIONS, descent.MODELS)
    asked = question_alone(folder, "from tasks.core.descent import carriers", f"carriers(here, session.store, [{sample!r}])")
    show("1,000,000 samples, 100 data versions, 1,000 models: all that was made from a sample", f"{asked:.2f} s", "2 s or less")
    show(f"the same as a command, with mlflow's import (first time {first:.1f} s)", f"{median(command, folder, 3):.2f} s", "")
    seen.write(folder / seen.FILE, seen.keys_of(f"sample-{at:07d}" for at in range(descent.SAMPLES)))
    show("what a model saw, a million ids", f"{(folder / seen.FILE).stat().st_size / 1e6:.2f} MB", "5 MB or less")


def erasure(place: Path) -> None:
    """A request for 50 samples of the main job's data, from the command to the certificate."""
    import pyarrow.parquet as pq

    folder = workspace.make(place / "erasure", full_size())
    timed([PYTHON, "-m", "flows.cli", "run"], folder)
    judged = pq.read_table(sorted((folder / "data" / "filtered").glob("part-*.parquet")), columns=["sample_id", "kept"]).to_pylist()
    (place / "ids.txt").write_text("\n".join([row["sample_id"] for row in judged if row["kept"]][:50]))
    seconds = timed([PYTHON, "-m", "flows.cli", "forget", "--samples", "../ids.txt"], folder)
    certified = len(list((folder / ".retort" / "certificates").glob("*.json")))
    show(f"erasure of 50 samples of the digits, end to end ({certified} certificate)", f"{seconds:.0f} s", "120 s or less")


def filtering(place: Path) -> None:
    """A million image-text rows through the filter: beside the network alone, in bounded memory, and again after a kill."""
    from tests.benchmarks import filtering as large

    folder = workspace.make(place / "job", full_size())
    large.make_pool(folder / "data" / "pool", large.ROWS)
    whole = large.run(folder)
    had = f"{whole['threads']:.0f} torch thread, {whole['cores']:.0f} cores"
    show(f"{whole['rows']:,.0f} rows scored", f"{whole['rate']:,.0f} rows/s", "")
    show("with verdicts and figures", f"{whole['rate_with_verdicts']:,.0f} rows/s", "")
    show(f"bare forward pass of the small network, {had}", f"{whole['bare']:,.0f} rows/s", "")
    show(f"filter over it, {had}", f"{whole['ratio']:.2f}", "0.9 or more")
    show("the same, both held to one core", f"{whole['ratio_one_core']:.2f}", "")
    clip = large.run(folder, what="clip")
    had = f"{clip['threads']:.0f} torch thread, {clip['cores']:.0f} cores"
    show(f"CLIP of the size of ViT-B/32, {clip['flops'] / 1e9:.1f} GFLOP a row, {had}", f"{clip['rate']:,.1f} images/s", "")
    show("filter over its bare forward pass, the same threads and cores", f"{clip['ratio']:.2f}", "0.9 or more")
    done = clip["rate"] * clip["flops"]
    if clip["cuda"]:
        share = f"{done / clip['peak']:.2f}" if clip["peak"] else "RETORT_PEAK_TFLOPS?"
        show(f"share of the card's peak, at {done / 1e12:.0f} TFLOP/s", share, "")
    show("memory that grew meanwhile", f"{whole['grown_mb']:.0f} MB", "")
    if "datasets" in whole:
        show("over datasets.map with the same reader and scorer", f"{whole['rate'] / whole['datasets']:.2f}", "1 or more")
    show("by Ray on one core, its actors' start included, over local", f"{whole['ray'] / whole['rate']:.2f}", "")
    show("by Ray on one core, of twice as many rows the second half", f"{whole['ray_more'] / whole['rate']:.2f}", "0.87 or more")
    chosen = large.thresholds()
    show("a threshold on a million scores and the uids, over DataComp's way", f"{chosen['theirs'] / chosen['ours']:.2f}", "1 or more")
    show("its uids", "the same" if chosen["same"] else "OTHERS", "the same")
    again = large.run(folder, killed_at=0.6)
    show("a run that was killed at 60%, its second time over the whole", f"{again['seconds'] / whole['seconds']:.2f}", "0.4 or so")
    show("its scores", "the same" if again["sum"] == whole["sum"] else "OTHERS", "the same")


def near_duplicates(place: Path) -> None:
    """Rows a second of the cascade on text, and of the search for near-duplicates beside the usual library at equal recall."""
    from tests.benchmarks import dedup

    dedup.report(show)


def distilling(place: Path) -> None:
    """What a step of distillation costs beside its bare parts, a loop by hand, and the field's trainer."""
    from tests.benchmarks import distilling as steps

    steps.report(show)


def students(place: Path) -> None:
    """All distillers on one teacher and one size of student."""
    from tests.benchmarks import students as table

    table.report(show)


def condensing(place: Path) -> None:
    """KRR-ST on images of 28 and 32 pixels with 10, 50 and 100 samples: held-out loss beside random and k-means images, one seed each."""
    from tasks.condense.krr_st import Config, krr_st
    from tests.claims.samples import dataset, images

    rows = int(os.environ.get("RETORT_ROWS", "4000"))
    for name, source in (("28x28 grey", shared_data() / "fashion_mnist"), ("32x32 colour", shared_data() / "emoji" / "openmoji.parquet")):
        found = images(source, "train")
        order = np.random.default_rng(0).permutation(len(found.labels))
        data, held_out = (
            dataset(found.pixels[at], found.labels[at], found.classes, prefix=prefix)
            for at, prefix in ((order[500 : 500 + rows], "r"), (order[:500], "h"))
        )
        for n in (10, 50, 100):
            began = time.process_time()
            figures = krr_st(data, held_out, n, Config(), seed=0).figures
            ours, *others = (figures[f"heldout_loss{arm}"] for arm in ("", "_random", "_kmeans"))
            show(f"krr_st, {name}, {n} samples: held-out loss", f"{ours:.3f}", f"below random {others[0]:.3f}, k-means {others[1]:.3f}")
            show(f"krr_st, {name}, {n} samples: CPU time", f"{time.process_time() - began:.0f} s", "")
    again(rows, 50, place)


def again(rows: int, n: int, place: Path) -> None:
    """KRR-ST after a twentieth of the rows was exchanged: from the last result and from scratch, with all outer steps and with a third."""
    from dataclasses import replace

    from tasks.condense.krr_st import Config, krr_st
    from tasks.core.dataset import Dataset, Writer
    from tests.claims.samples import dataset, images

    found, cfg = images(shared_data() / "fashion_mnist", "train"), Config()
    third = cfg.model_copy(update={"outer_steps": cfg.outer_steps // 3})
    losses: dict[str, list[float]] = {}
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(found.labels))
        held_out, before, after = (
            dataset(found.pixels[at], found.labels[at], found.classes, prefix=prefix)
            for at, prefix in ((order[:500], "h"), (order[500 : 500 + rows], "r"), (order[500 + rows // 20 : 500 + rows + rows // 20], "s"))
        )
        with Writer(place / f"condensed-{seed}", replace(before.info, schema="condensed")) as out:
            out.write(krr_st(before, held_out, n, cfg, seed=seed).rows)
        start = Dataset.open(place / f"condensed-{seed}")
        for steps, settings in (("all steps", cfg), ("a third", third)):
            scratch = krr_st(after, held_out, n, settings, seed=seed).figures
            going_on = krr_st(after, held_out, n, settings, start=start, seed=seed).figures
            losses.setdefault(f"from scratch, {steps}", []).append(scratch["heldout_loss"])
            losses.setdefault(f"from the last result, {steps}", []).append(going_on["heldout_loss"])
        losses.setdefault("random images", []).append(going_on["heldout_loss_random"])
        losses.setdefault("the last result as it is", []).append(going_on["heldout_loss_start"])
    for arm, values in losses.items():
        each = ", ".join(f"{value:.4f}" for value in values)
        show(f"krr_st, {n} samples, 5% other rows, {arm}: held-out loss", f"{np.mean(values):.4f}", f"to be read; by seed {each}")


def question_alone(folder: Path, imports: str, question: str) -> float:
    """Median seconds of three askings, each in a process of its own that has imported mlflow and torch and opened the store."""
    code = (
        "import time, mlflow, torch; from flows._session import Session, use; from tasks.core.settings import project;"
        f"{imports}; here = project(); session = Session(here); session.store.names(); holding = use(session); holding.__enter__();"
        f"began = time.perf_counter(); {question}; print(time.perf_counter() - began)"
    )
    return sorted(float(timed_output([PYTHON, "-c", code], folder).split()[-1]) for _ in range(3))[1]


def promotion(folder: Path) -> tuple[float, float]:
    """Seconds of the flow that promotes a version on evidence that is there, and of the whole command."""
    command = [PYTHON, "-m", "flows.cli", "promote", "digits-teacher", "--version"]
    timed([*command, "1"], folder)
    timed([*command, "2"], folder)
    began = time.perf_counter()
    shown = timed_output([*command, "1"], folder)
    whole = time.perf_counter() - began
    row = next(line for line in shown.splitlines() if line.startswith("│ promote"))
    return float(row.split("│")[4]), whole


def thousand(folder: Path) -> None:
    """Fill the registry up to 1,000 versions, a hundred each of ten models, each with its tags and description."""
    from tasks.core.settings import Settings
    from tasks.core.store import Store

    os.environ.update(environment())
    store = Store(Settings(folder))
    model = store.version("digits-student", 1)
    tags = dict(model.tags)
    for at in range(10):
        name = f"other{at}-student"
        store.client.create_registered_model(name)
        for _ in range(100):
            store.client.create_model_version(name, model.source, model.run_id, tags=tags, description=model.description)
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    board = {"flash": "1 MiB", "ram": "256 KiB", "sensors": ["camera"]}
    workspace.write_params(folder, {**params, "devices": {"board": board}})


def timed_output(command: list[str], folder: Path) -> str:
    ran = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"{command} failed:\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}")
    return ran.stdout


def _with_tests(folder: Path) -> Path:
    shutil.copytree(workspace.catalog.ROOT / "tests", folder / "tests", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


ALL: dict[str, Callable[[Path], None]] = {
    "main_job": main_job,
    "commands": commands,
    "dvc_status": dvc_status,
    "batches": batches,
    "memory": memory,
    "concurrent": concurrent,
    "registry": registry,
    "lineage": lineage,
    "erasure": erasure,
    "filtering": filtering,
    "near_duplicates": near_duplicates,
    "condensing": condensing,
    "distilling": distilling,
    "students": students,
}


def main(names: list[str]) -> None:
    for name in names or list(ALL):
        with tempfile.TemporaryDirectory(dir=Path.home() if not Path("/var/tmp").is_dir() else "/var/tmp") as place:
            ALL[name](Path(place))


if __name__ == "__main__":
    main(sys.argv[1:])
