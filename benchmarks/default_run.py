"""The README's first command: training with nothing given, on Ray. Seconds of the whole command, validation loss.

python benchmarks/default_run.py
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path

from support.harness import orchestrate, report

LIMIT_NATS = 1.95
LIMIT_S = 300.0


def main() -> None:
    """Run and report."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = orchestrate(
            "train", "--cluster", "laptop", "--run-dir", str(Path(folder) / "run"), "--json", home=Path(folder),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        out, _ = process.communicate()
        seconds = time.perf_counter() - start
    result = json.loads(out)
    row = {
        "val_loss": result["val_loss"],
        "limit_nats": LIMIT_NATS,
        "whole_command_s": seconds,
        "limit_s": LIMIT_S,
    }
    report("default_run", [row | result["baselines"] | {"tokens_per_s": result["tokens_per_s"]}])


if __name__ == "__main__":
    main()
