"""Seconds from the command to the first finished training step, and of `orchestrate --help`.

Cold: no Program in the cache. Cached: the same command again.   python benchmarks/startup.py [--rounds 3] [--no-ray]
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

from support.harness import POLL_S, median, orchestrate, report, seconds_of

TARGETS = {
    ("inline", "cold"): 15.0,
    ("inline", "cached"): 6.0,
    ("ray", "cold"): 25.0,
    ("ray", "cached"): 15.0,
}
GIVE_UP_S = 180.0


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-ray", action="store_true")
    options = parser.parse_args()
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.rounds):
        for runner in ("inline",) if options.no_ray else ("inline", "ray"):
            with tempfile.TemporaryDirectory() as folder:
                for state in ("cold", "cached"):
                    times.setdefault((runner, state), []).append(first_step(runner, Path(folder), state))
    rows: list[dict[str, object]] = [
        {"what": f"first step, {runner}, {state}", "median_s": median(found), "worst_s": max(found),
         "target_s": TARGETS[runner, state], "rounds": len(found)}
        for (runner, state), found in times.items()
    ]  # fmt: skip
    helps = [seconds_of(show_help) for _ in range(5 * options.rounds)]
    rows.append({"what": "orchestrate --help", "median_s": median(helps), "worst_s": max(helps), "target_s": 0.5,
                 "rounds": len(helps)})  # fmt: skip
    report("startup", rows)


def show_help() -> None:
    """One help text."""
    process = orchestrate("--help", stdout=subprocess.DEVNULL)
    assert process.wait() == 0


def first_step(runner: str, home: Path, name: str) -> float:
    """Seconds until the first line of metrics.jsonl is there."""
    run_dir = home / name
    start = time.perf_counter()
    process = orchestrate(
        "train", "--cluster", "laptop", "--runner", runner, "--steps", "2", "--run-dir", str(run_dir), home=home,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() in (None, 0), f"{runner} ended with {process.returncode}"
        assert time.perf_counter() - start < GIVE_UP_S, f"{runner} took too long"
        time.sleep(POLL_S)
    taken = time.perf_counter() - start
    assert process.wait() == 0
    return taken


if __name__ == "__main__":
    main()
