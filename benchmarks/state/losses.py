"""Machines, actors and drivers that are lost in the middle of a run on four raylets: who ends when, and what is left.

cd benchmarks; python -m state.losses [--trials 60] [--seed 0]

A trial starts `orchestrate train --address ...` on four raylets of this machine, waits for a step drawn at random and
takes a raylet, an actor's process or the driver away. Then: how long until the run has ended, whether it names chips
and a cause, whether its newest checkpoint is whole, and what of the run is alive 15 s later.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster
from support.harness import orchestrate, report

from orchestrator.runs.checkpoints.checkpoint_folder import latest
from orchestrator.runs.metrics import read_metrics

KINDS = ("machine", "actor", "driver")
STEPS, ACTORS = 10_000, 4
END_S, CLEAN_S, LIMIT_S = 10.0, 15.0, 300.0
ACTOR = "ray::ChipActor"  # how Ray calls the process of an actor of ours
HOSTS = """
kind: cluster
version: 1
name: four-hosts
device: cpu
hosts:
  - count: 4
    chips:
      - name: one CPU core
        class: cpu
        count: 1
        peak: {fp32: 94 GFLOP/s}
        memory: {capacity: 4 GB, bandwidth: 35 GB/s}
    nics: {count: 1, bandwidth: 10 Gb/s, latency: 20 us}
scale_out:
  - {name: ethernet, hosts: any}
"""
JOB = (
    "train", "--model", "builtin:gpt-nano", "--seq", "16", "--global-batch", "8",
    "--steps", str(STEPS), "--set", "model_args={layers: 2, width: 32, heads: 2, max_seq: 16}", "--set",
    "checkpoints.every=2", "--set", "validation.every=0", "--set", "plan.dp=4",
)  # fmt: skip


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draws, rows = random.Random(options.seed), list[dict[str, object]]()
    raylets = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": {"worker_niceness": 0}},
    )
    for _ in range(ACTORS - 1):
        raylets.add_node(num_cpus=1)
    try:
        for number in range(options.trials):
            with tempfile.TemporaryDirectory() as home:
                row = trial(KINDS[number % len(KINDS)], draws.randint(2, 30), raylets, Path(home), draws)
            rows.append(row)
            print(json.dumps(row), flush=True)
    finally:
        raylets.shutdown()
        ray.shutdown()
    good = sum(bool(row["good"]) for row in rows)
    rows.append({"lost": "all", "good": f"{good} of {options.trials}"})
    report("losses", rows)
    sys.exit(good < options.trials)


def trial(kind: str, step: int, raylets: Cluster, home: Path, draws: random.Random) -> dict[str, object]:
    """One run that loses something after `step`."""
    folder, others = home / "run", actors_now()
    assert not others, f"actors of something else are here: {others}"
    (home / "four.yaml").write_text(HOSTS)
    process = orchestrate(
        *JOB, "--cluster", str(home / "four.yaml"), "--address", raylets.address, "--run-dir", str(folder),
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )  # fmt: skip
    wait_for(lambda: len(read_metrics(folder / "metrics.jsonl")) >= step or process.poll() is not None)
    assert process.poll() is None, process.stderr.read() if process.stderr else ""
    lost = take(kind, raylets, process, draws)
    start = time.monotonic()
    _, said = process.communicate(timeout=LIMIT_S)
    seconds = time.monotonic() - start
    if kind == "machine":
        raylets.add_node(num_cpus=1)
    names = kind == "driver" or (
        process.returncode == 1
        and bool(re.search(r"error: actor \d+ has ended: its \w+", said))
        and "(chip" in said
    )
    found = latest(folder)
    left = wait_gone(lost, start + CLEAN_S)
    whole = found.checkpoint is not None and found.checkpoint.manifest.step >= step - 2 and not found.warnings
    return {
        "lost": kind, "at_step": step, "ended_s": seconds, "names_it": names, "checkpoint_whole": whole,
        "left_after_15_s": left, "good": seconds <= END_S and names and whole and not left,
    }  # fmt: skip


def take(kind: str, raylets: Cluster, process: "subprocess.Popen[str]", draws: random.Random) -> int:
    """Take it away at once; the number of the driver's process."""
    actors = actors_now()
    if kind == "machine":
        raylets.remove_node(draws.choice(sorted(raylets.worker_nodes, key=lambda node: node.node_id)), False)
    else:
        os.kill(process.pid if kind == "driver" else draws.choice(actors), signal.SIGKILL)
    return process.pid


def actors_now() -> list[int]:
    """Processes of actors of ours on this machine."""
    return sorted(
        each.pid for each in psutil.process_iter(["cmdline"]) if ACTOR in " ".join(each.info["cmdline"] or ())
    )


def wait_gone(driver: int, end: float) -> list[str]:
    """What of a run is alive at the end of its time, as soon as there is nothing."""
    while True:
        left = [f"actor process {pid}" for pid in actors_now()]
        left += (
            ["driver"] if psutil.pid_exists(driver) and psutil.Process(driver).status() != "zombie" else []
        )
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.2)


def wait_for(is_so: Callable[[], bool]) -> None:
    """Until it is so."""
    end = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < end, "no step came"
        time.sleep(0.05)


if __name__ == "__main__":
    main()
