"""What every benchmark shares: run a command, take medians, print a table, write JSON beside the benchmark."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
POLL_S = 0.02


def orchestrate(*args: str, home: Path | None = None, **more: object) -> subprocess.Popen[str]:
    """Start the command line with its own cache folder below `home`."""
    environment = dict(os.environ) | ({"HOME": str(home)} if home else {})
    command = [str(Path(sys.executable).parent / "orchestrate"), *args]
    return subprocess.Popen(command, env=environment, text=True, **more)  # type: ignore[call-overload,no-any-return]


def seconds_of(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def report(name: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows as a table and keep them as benchmarks/results/NAME.json."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [heads, *([_text(row.get(head, "")) for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    RESULTS.mkdir(exist_ok=True)
    document = {
        "benchmark": name,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "rows": list(rows),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
