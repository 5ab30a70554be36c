"""Tokens/s of dp2 on two Ray actors over torchrun + DistributedDataParallel + gloo: an 11M GPT, one thread a chip.

Both step in turns in one run, so that a busy machine slows both alike; the figure is the median of the ratios of
neighbouring turns.   cd benchmarks; python -m scaling.against_ddp [--rounds 40] [--tokens 512 4096]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support.harness import median, report, seconds_of
from throughput import random_batch, settings_of, stepper

from comms.selection.progress import quiet
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.job_file import load_job
from orchestrator.runners.on_ray.ray_launch import RayLaunch
from orchestrator.runners.timing.fastest_plan import prepare

WORKER = Path(__file__).parents[1] / "tools" / "ddp_worker.py"
SEQ, CHIPS = 256, 2
STEPS = {
    512: 2,
    4096: 1,
}  # a turn: the shorter, the more alike are neighbours on a machine that others use, too


@contextmanager
def ddp(samples: int) -> Iterator[Callable[[int], float]]:
    """What has two ranks make some steps, and says how many seconds that took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rank in range(CHIPS):
            os.mkfifo(folder / f"go-{rank}")
            os.mkfifo(folder / f"done-{rank}")
        command = [
            "-m", "torch.distributed.run", "--nproc-per-node", str(CHIPS), str(WORKER), name, str(samples), str(SEQ)
        ]  # fmt: skip
        process = subprocess.Popen([sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": "1"})
        done = [(folder / f"done-{rank}").open() for rank in range(CHIPS)]
        go = [(folder / f"go-{rank}").open("w") for rank in range(CHIPS)]

        def turn(steps: int) -> float:
            for each in go:
                each.write(f"{steps}\n")
                each.flush()
            return max(float(each.readline()) for each in done)

        yield turn
        for each in go:
            each.close()
        process.wait()


def measured(tokens: int, rounds: int) -> dict[str, object]:
    """One size of a chip's batch."""
    samples, steps = tokens // SEQ, STEPS[tokens]
    job = ["model=builtin:gpt-10m", f"seq={SEQ}", f"global_batch={CHIPS * samples}", "microbatches=1", "plan.dp=2",
           "plan.tp=1", "plan.pp=1"]  # fmt: skip
    cluster = load_cluster(cluster_path("laptop")).take(CHIPS)
    prepared = prepare(cluster, load_job(None, job))
    launch = RayLaunch(cluster)
    runner = launch.connect(prepared.program, settings_of(prepared), quiet)
    step = stepper(runner, prepared, random_batch(prepared))
    ours, theirs = [], []
    with ddp(samples) as turn:
        step(), turn(1)  # warm up
        for _ in range(rounds):
            theirs.append(turn(steps))
            ours.append(seconds_of(lambda: [step() for _ in range(steps)]))
    launch.close()
    ratios = sorted(their / our for their, our in zip(theirs, ours, strict=True))
    return {
        "tokens_per_chip": tokens, "ours_tokens_per_s": CHIPS * tokens * steps / median(ours),
        "ddp_tokens_per_s": CHIPS * tokens * steps / median(theirs), "over_ddp": median(ratios),
        "quarter": ratios[len(ratios) // 4], "three_quarters": ratios[3 * len(ratios) // 4], "rounds": rounds,
    }  # fmt: skip


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 4096])
    options = parser.parse_args()
    report("against_ddp", [measured(tokens, options.rounds) for tokens in options.tokens])


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"took {time.perf_counter() - start:.0f} s")
