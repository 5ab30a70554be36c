import json
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.config.hardware.cluster import Cluster, Device
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.runners.ray_jobs.job_command import JobCommand
from orchestrator.runners.ray_jobs.manifests import (
    STORAGE,
    KubeRaySettings,
    SlurmSettings,
    kuberay,
    machines_of,
    slurm,
)

SCHEMA = json.loads((Path(__file__).parent / "rayjob.schema.json").read_text())
TRAIN = JobCommand(("train", "--cluster", "dgx-a100", "--chips", "16"))


@pytest.fixture(scope="module")
def real() -> Cluster:
    """Two hosts of eight GPUs."""
    return replace(load_cluster(cluster_path("dgx-a100")).take(16), device=Device.CUDA)


def kuberay_document(command: JobCommand, cluster: Cluster, **settings: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(
        kuberay(command, cluster, KubeRaySettings.model_validate(settings))
    )
    jsonschema.Draft7Validator(SCHEMA).validate(document)
    return document


def test_a_rayjob_has_a_worker_per_host_with_all_its_gpus(real: Cluster) -> None:
    spec = kuberay_document(TRAIN, real, image="mine/orchestrate:2.61.0")["spec"]
    (worker,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (worker["replicas"], worker["minReplicas"], worker["maxReplicas"]) == (2, 2, 2)
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (limits["cpu"], limits["nvidia.com/gpu"], limits["memory"]) == ("8", "8", "32Gi")
    assert spec["rayClusterSpec"]["rayVersion"] == "2.61.0"
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert shlex.split(spec["entrypoint"])[2:] == ["orchestrator", *TRAIN.words]


def test_runs_of_a_rayjob_are_on_the_claim_that_is_named(real: Cluster) -> None:
    given = {"storage": "runs", "namespace": "ml", "working_dir": "https://x/y.zip", "memory": "64Gi"}
    document = kuberay_document(TRAIN, real, **given)
    assert document["metadata"]["namespace"] == "ml"
    assert f"--run-dir {STORAGE}/orchestrate" in document["spec"]["entrypoint"]
    assert yaml.safe_load(document["spec"]["runtimeEnvYAML"])["working_dir"] == "https://x/y.zip"
    pod = document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "runs"
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == STORAGE
    said = JobCommand((*TRAIN.words, "--run-dir", "/mine"))
    assert kuberay_document(said, real, storage="runs")["spec"]["entrypoint"].count("--run-dir") == 1


def test_simulated_chips_ask_for_cores_on_one_machine() -> None:
    many = load_cluster(cluster_path("dgx-a100")).take(1024)
    assert machines_of(replace(many, actors=3)).cores == 3
    assert (machines_of(many).count, machines_of(many).gpus) == (1, 0)


FAKES = {
    "scontrol": 'case "$1" in show) echo n1; echo n2;; requeue) echo "requeue $2" >> "$OUT";; esac',
    "srun": 'echo "srun $*" >> "$OUT"; exec sleep 1000',
    "ray": "echo ' 1 node_a'; echo ' 1 node_b'",
    "sleep": 'exec /bin/sleep "$@"',
    "python": 'if [ "$1" = -c ]; then exec python3 "$@"; fi; echo "python $*" >> "$OUT"; exec "$DRIVER"',
}


def run_script(script: str, folder: Path, driver: str, **environment: str) -> tuple[int, list[str]]:
    """Its exit code, and what it had the scheduler, Ray and us do; all of these are stand-ins."""
    tools = folder / "tools"
    tools.mkdir()
    (folder / "driver").write_text(f"#!/bin/bash\n{driver}\n")
    (folder / "driver").chmod(0o755)
    for name, text in FAKES.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    out = folder / "out"
    known = {
        "PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(out), "DRIVER": str(folder / "driver"),
        "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env={**os.environ, **known, **environment}, timeout=60
    )
    return done.returncode, out.read_text().splitlines()


def test_a_batch_script_starts_ray_on_every_node_and_then_the_run(real: Cluster, tmp_path: Path) -> None:
    script = slurm(TRAIN, real, SlurmSettings(partition="gpu", setup="export SEEN=1"))
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    for wanted in ("nodes=2", "ntasks-per-node=1", "gpus-per-node=8", "partition=gpu", "signal=B:USR1@120"):
        assert f"#SBATCH --{wanted}" in directives
    assert not any("account" in line for line in directives)
    code, did = run_script(script, tmp_path, 'test "$SEEN" = 1')
    assert code == 0
    first, second = sorted(line for line in did if line.startswith("srun"))
    assert "-w n1 ray start --head --port=20017 --num-cpus=8 --num-gpus=8" in first
    assert "-w n2 ray start --address=n1:20017 --num-cpus=8 --num-gpus=8" in second
    (run,) = (line for line in did if line.startswith("python"))
    assert (
        run == f"python -m orchestrator {' '.join(TRAIN.words)} --run-dir runs/orchestrate-17 --address auto"
    )


def test_a_warning_reaches_the_run_and_the_job_that_comes_again_goes_on(
    real: Cluster, tmp_path: Path
) -> None:
    script = slurm(TRAIN, real, SlurmSettings())
    saves = 'trap \'mkdir -p "$RUN"; touch "$RUN/run.yaml"; exit 138\' USR1; kill -USR1 $PPID; while :; do :; done'
    run = tmp_path / "runs" / "orchestrate-17"
    code, did = run_script(script, tmp_path, saves, RUN=str(run))
    assert code == 138
    assert "requeue 17" in did
    for file in (tmp_path / "tools").iterdir():
        file.unlink()
    (tmp_path / "tools").rmdir()
    code, did = run_script(script, tmp_path, "exit 0")
    assert code == 0
    assert "python -m orchestrator train --resume runs/orchestrate-17 --address auto" in did
