"""Signals at random moments, then `--resume`: nothing lost, nothing repeated, the same bits as an undisturbed run.

cd benchmarks; python -m state.signals [--trials 100] [--runner inline] [--seed 0]

A trial starts `orchestrate train`, sends one signal (some twice, SIGKILL among them) at a moment drawn from the whole
life of an undisturbed run, from before Python has started to the end, and resumes until the run is done. A checkpoint
is written after every step, so that saving is hit as often as stepping. A process that was stopped before it had a run
directory is started once more by the same command.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from support.harness import orchestrate, report

from orchestrator.runs.checkpoints.checkpoint_folder import latest, load

STEPS = 30
JOB = (
    "train", "--cluster", "laptop", "--chips", "2", "--model", "builtin:gpt-nano", "--seq", "16", "--global-batch", "8",
    "--steps", str(STEPS), "--set", "model_args={layers: 2, width: 32, heads: 2, max_seq: 16}", "--set",
    "checkpoints.every=1", "--set", "validation.every=10", "--set", "validation.batches=1", "--set", "plan.dp=2",
)  # fmt: skip
KINDS: tuple[tuple[signal.Signals, ...], ...] = (
    (signal.SIGINT,), (signal.SIGTERM,), (signal.SIGHUP,), (signal.SIGUSR1,), (signal.SIGKILL,),
    (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT),
)  # fmt: skip
FACTS = ("step", "loss", "grad_norm", "lr", "val_loss")
LIMIT_S = 300.0
SHELL = 128


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code as shells say it, and what it said."""

    code: int
    said: str
    seconds: float


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--runner", default="inline", choices=("inline", "ray"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "undisturbed"
        whole = run(Path(home), folder, options.runner)
        assert whole.code == 0, whole.said
        expected, draws = left(folder), random.Random(options.seed)
        for number in range(options.trials):
            kinds = KINDS[number % len(KINDS)]
            row = trial(Path(home), kinds, draws.uniform(0, whole.seconds), options.runner, expected)
            rows.append(row)
            print(json.dumps(row), flush=True)
    good = sum(bool(row["good"]) for row in rows)
    rows.append({"signals": "all", "good": f"{good} of {options.trials}"})
    report(f"signals_{options.runner}", rows)
    sys.exit(good < options.trials)


def trial(
    home: Path, kinds: tuple[signal.Signals, ...], at_s: float, runner: str, expected: object
) -> dict[str, object]:
    """One disturbed run, brought to its end."""
    folder = home / "disturbed"
    ended = run(home, folder, runner, kinds, at_s)
    begun = latest(folder).checkpoint
    reached = begun.manifest.step if begun else 0
    again = resumed(home, folder, runner)
    is_same = same(left(folder), expected)
    codes = {SHELL + kind for kind in kinds} | ({0} if reached == STEPS else set())
    tracebacks = ended.said.count("Traceback") + again.said.count("Traceback")
    shutil.rmtree(folder)
    return {
        "signals": "+".join(kind.name for kind in kinds), "at_s": round(at_s, 2), "exit_code": ended.code,
        "ended_after_s": round(ended.seconds - at_s, 2), "reached": reached, "tracebacks": tracebacks,
        "same": is_same, "good": is_same and not tracebacks and ended.code in codes and again.code == 0,
    }  # fmt: skip


def run(
    home: Path, folder: Path, runner: str, kinds: tuple[signal.Signals, ...] = (), at_s: float = 0.0
) -> Ended:
    """The command, with its signals a moment apart."""
    start = time.perf_counter()
    process = orchestrate(
        *JOB, "--runner", runner, "--run-dir", str(folder), home=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    if kinds:
        time.sleep(at_s)
        for kind in kinds:
            process.send_signal(kind)
            time.sleep(0.01)
    said = process.communicate(timeout=LIMIT_S)[0]
    code = process.returncode if process.returncode >= 0 else SHELL - process.returncode
    return Ended(code, said, time.perf_counter() - start)


def resumed(home: Path, folder: Path, runner: str) -> Ended:
    """The run, at its end."""
    if not (folder / "run.yaml").exists():
        shutil.rmtree(folder, ignore_errors=True)
        return run(home, folder, runner)
    start = time.perf_counter()
    process = orchestrate(
        "train", "--resume", str(folder), home=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = process.communicate(timeout=LIMIT_S)[0]
    return Ended(process.returncode, said, time.perf_counter() - start)


def left(folder: Path) -> tuple[list[list[object]], dict[tuple[str, ...], torch.Tensor]]:
    """What a run has left: the numbers of every step, and all tensors of its last checkpoint."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = latest(folder).checkpoint
    assert found is not None and found.manifest.step == STEPS
    parts = {(entry.part, entry.name, entry.state): value for entry, value in load(found).parts()}
    return [[line[fact] for fact in FACTS] for line in lines], parts


def same(one: object, other: object) -> bool:
    """Bit for bit."""
    assert isinstance(one, tuple) and isinstance(other, tuple)
    return (
        one[0] == other[0]
        and one[1].keys() == other[1].keys()
        and all(torch.equal(value, other[1][key]) for key, value in one[1].items())
    )


if __name__ == "__main__":
    main()
