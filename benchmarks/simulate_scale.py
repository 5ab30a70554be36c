"""`orchestrate simulate` of GPT-3 175B, tp8 pp8, as whole commands: cold and cached, 1,024 and 16,384 A100.

Commands of both sizes alternate; the global batch grows with dp.   python benchmarks/simulate_scale.py [--rounds 3]
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from support.harness import median, orchestrate, report, seconds_of

SIZES = {1024: 1536, 16384: 24576}  # chips: sequences per step
MODEL = (
    "--model",
    "builtin:gpt-175b",
    "--seq",
    "2048",
    "--set",
    "dtype=bf16",
    "--set",
    "plan.tp=8",
    "--set",
    "plan.pp=8",
)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    times: dict[tuple[int, str], list[float]] = {}
    answers: dict[int, dict[str, object]] = {}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for state in ("cold", "cached", "cached"):
                for chips in SIZES:
                    taken = seconds_of(
                        lambda chips=chips: answers.__setitem__(chips, simulate(chips, Path(folder)))
                    )
                    times.setdefault((chips, state), []).append(taken)
    base = {state: median(times[1024, state]) for state in ("cold", "cached")}
    report("simulate_scale", [
        {"chips": chips, "state": state, "median_s": median(found), "over_1024": median(found) / base[state],
         "step_time_s": answers[chips]["step_time_s"], "mfu": answers[chips]["mfu"],
         "tokens_per_s": answers[chips]["tokens_per_s"], "simulate_alone_s": answers[chips]["elapsed_s"]}
        for (chips, state), found in times.items()
    ])  # fmt: skip


def simulate(chips: int, home: Path) -> dict[str, object]:
    """The answer of one command."""
    process = orchestrate(
        "simulate", "--cluster", "dgx-a100", "--chips", str(chips), "--global-batch", str(SIZES[chips]), *MODEL,
        "--json", home=home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    out, _ = process.communicate()
    found: dict[str, object] = json.loads(out)
    return found


if __name__ == "__main__":
    main()
