"""Manifests: a command of ours as a job of KubeRay or Slurm, for the machines that a cluster file describes.

KubeRay: a `RayJob` of `ray.io/v1`, as its custom resource definition of release 1.5 has it: a head without chips, and
one worker per host. Slurm: a batch script with one task per node, on which Ray starts by itself; the batch system's
warning (SIGUSR1) reaches the run, which saves, and a job that is queued again goes on where it was.

Neither scheduler brings files along: the command's files are in the image or on storage that all machines have.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.schema import Section
from orchestrator.runners.on_ray.placement import spread_plan
from orchestrator.runners.ray_jobs.job_command import JobCommand

STORAGE = "/mnt/orchestrate"  # where a claim's volume is in every container
SIMULATING_CORES = 4  # for simulated chips, where the file does not say how many actors there are
WARN_S = 120  # before Slurm's time limit
HEAD_CORES, HEAD_MEMORY = 2, "8Gi"
CORE_MEMORY_GI = 4  # of a worker, per core


class KubeRaySettings(Section):
    """What a cluster file does not say: `--set image=...` and so on."""

    name: str = "orchestrate"
    namespace: str | None = None
    image: str = "rayproject/ray:2.60.0-py311"  # with orchestrate installed, or a `working_dir` that has it
    working_dir: str | None = None  # an archive that all pods reach (https, s3, gs)
    storage: str | None = None  # a claim of a volume that all pods may write, for run directories
    memory: str | None = None  # of a worker


class SlurmSettings(Section):
    """What a cluster file does not say: `--set partition=...` and so on."""

    name: str = "orchestrate"
    partition: str | None = None
    account: str | None = None
    time: str = "24:00:00"
    setup: str | None = None  # shell lines before all else, such as the activation of an environment


@dataclass(frozen=True, slots=True)
class Machines:
    """What a scheduler is asked for: machines, and the cores and GPUs of each."""

    count: int
    cores: int
    gpus: int


def machines_of(cluster: Cluster) -> Machines:
    """One machine per host with a core (and a GPU) per chip; simulated chips need cores only."""
    plan = spread_plan(cluster, SIMULATING_CORES)
    if plan.per_machine is None:
        return Machines(1, plan.num_actors, 0)
    return Machines(plan.num_bundles, plan.per_machine, plan.gpus * plan.per_machine)


def kuberay(command: JobCommand, cluster: Cluster, settings: KubeRaySettings) -> str:
    """The manifest, for `kubectl apply -f`."""
    machines = machines_of(cluster)
    words = JobCommand((*command.words, *_kept(command, settings)))
    environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(WARN_S)}}
    if settings.working_dir:
        environment["working_dir"] = settings.working_dir
    worker = {
        "groupName": "chips", "replicas": machines.count, "minReplicas": machines.count,
        "maxReplicas": machines.count, "rayStartParams": {"num-cpus": str(machines.cores)},
        "template": _pod(settings, "ray-worker", _resources(machines, settings)),
    }  # fmt: skip
    head = {"cpu": str(HEAD_CORES), "memory": HEAD_MEMORY}
    metadata = {"name": settings.name} | ({"namespace": settings.namespace} if settings.namespace else {})
    document = {
        "apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata,
        "spec": {
            "entrypoint": words.text, "shutdownAfterJobFinishes": True,
            "runtimeEnvYAML": yaml.safe_dump(environment, sort_keys=False),
            "rayClusterSpec": {
                "rayVersion": _ray_version(settings.image),
                # no cores of the head's are Ray's: chips are on the workers alone
                "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": _pod(settings, "ray-head", head)},
                "workerGroupSpecs": [worker],
            },
        },
    }  # fmt: skip
    return yaml.safe_dump(document, sort_keys=False, width=10_000)


def _kept(command: JobCommand, settings: KubeRaySettings) -> tuple[str, ...]:
    """Where a run is kept: on the claim's volume, unless the command says it."""
    is_run = command.words[0] == "train" and not (command.value("--run-dir") or command.value("--resume"))
    return ("--run-dir", f"{STORAGE}/{settings.name}") if is_run and settings.storage else ()


def _resources(machines: Machines, settings: KubeRaySettings) -> dict[str, str]:
    found = {"cpu": str(machines.cores), "memory": settings.memory or f"{CORE_MEMORY_GI * machines.cores}Gi"}
    return found | ({"nvidia.com/gpu": str(machines.gpus)} if machines.gpus else {})


def _pod(settings: KubeRaySettings, name: str, resources: Mapping[str, str]) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": name, "image": settings.image,
        "resources": {"limits": dict(resources), "requests": dict(resources)},
    }  # fmt: skip
    if not settings.storage:
        return {"spec": {"containers": [container]}}
    container["volumeMounts"] = [{"name": "runs", "mountPath": STORAGE}]
    claim = {"name": "runs", "persistentVolumeClaim": {"claimName": settings.storage}}
    return {"spec": {"containers": [container], "volumes": [claim]}}


def _ray_version(image: str) -> str:
    """As the image's tag says it, else as it is here."""
    import ray

    found = re.search(r":(\d+\.\d+\.\d+)", image)
    return found[1] if found else str(ray.__version__)


def slurm(command: JobCommand, cluster: Cluster, settings: SlurmSettings) -> str:
    """The script, for `sbatch`."""
    machines = machines_of(cluster)
    directives = {
        "job-name": settings.name, "nodes": machines.count, "ntasks-per-node": 1, "cpus-per-task": machines.cores,
        "gpus-per-node": machines.gpus or None, "time": settings.time, "partition": settings.partition,
        "account": settings.account, "signal": f"B:USR1@{WARN_S}", "output": f"{settings.name}-%j.log",
    }  # fmt: skip
    lines = [f"#SBATCH --{name}={value}" for name, value in directives.items() if value is not None]
    gpus = f" --num-gpus={machines.gpus}" if machines.gpus else ""
    return SCRIPT.format(
        directives="\n".join([*lines, "#SBATCH --requeue"]), setup=f"{settings.setup}\n" if settings.setup else "",
        start=f"--num-cpus={machines.cores}{gpus} --disable-usage-stats", run=_run_of(command, settings.name),
    )  # fmt: skip


def _run_of(command: JobCommand, name: str) -> str:
    """The command, and for a new run of training a second one for when the job is queued again."""
    words = ["python", "-m", "orchestrator", *command.words]
    if command.words[0] != "train":
        return f"run {shlex.join(words)}"
    kept = command.value("--run-dir") or f"runs/{name}-$SLURM_JOB_ID"
    if command.value("--resume"):
        return f"run {shlex.join([*words, '--address', 'auto'])}"
    first = words if command.value("--run-dir") else [*words, "--run-dir", "RUN_DIR"]
    again = ["python", "-m", "orchestrator", "train", "--resume", "RUN_DIR"]
    texts = [
        shlex.join([*each, "--address", "auto"]).replace("RUN_DIR", '"$run_dir"') for each in (first, again)
    ]
    return (
        f'run_dir="{kept}"\nif [ -e "$run_dir/run.yaml" ]; then\n  run {texts[1]}\nelse\n  run {texts[0]}\nfi'
    )


SCRIPT = """#!/bin/bash
{directives}

set -euo pipefail
{setup}
# Ray on every node: the first is the head.
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${{nodes[0]}}
port=$((20000 + SLURM_JOB_ID % 20000))
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"

srun --nodes=1 --ntasks=1 -w "$head" ray start --head --port=$port {start} --block &
for node in "${{nodes[@]:1}}"; do
  srun --nodes=1 --ntasks=1 -w "$node" ray start --address="$head:$port" {start} --block &
done
until ray status --address="$head:$port" 2>/dev/null | grep -c '^ 1 node_' | grep -qx "${{#nodes[@]}}"; do sleep 2; done

# Slurm's warning before the time limit goes to this script alone: the run is told, saves and ends.
run() {{
  "$@" &
  driver=$!
  trap 'kill -USR1 $driver' USR1
  trap 'kill -TERM $driver' TERM
  code=0
  wait $driver || code=$?
  while kill -0 $driver 2>/dev/null; do code=0; wait $driver || code=$?; done
  kill $(jobs -p) 2>/dev/null || true
  if [ $code -eq 138 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
  exit $code
}}

{run}
"""
