"""`orchestrate scale` of GPT-3 1.3B, 13B and 175B, weak and strong, 8 to 16,384 A100: 36 points, cold and cached.

Whole commands, imports included. Some points are then asked of `simulate` by themselves, with the plan that was taken:
the figures must be the same.   python -m scaling.scale_sweep [--single 6]
"""

import argparse
import json
import resource
import subprocess
import tempfile
import time
from pathlib import Path

from support.harness import orchestrate, report

CHIPS = (8, 32, 256, 1024, 4096, 16384)
MODELS = ("builtin:gpt-1.3b", "builtin:gpt-13b", "builtin:gpt-175b")
SEQ, BATCH, PER_CHIP = 2048, 2048, 1
SWEEP = f"""kind: sweep
version: 1
cluster: dgx-a100
set: [dtype=bf16, seq={SEQ}, global_batch={BATCH}]
chips: {list(CHIPS)}
modes: [weak, strong]
batch_per_chip: {PER_CHIP}.0
vary: {{model: {json.dumps(MODELS)}}}
"""
SAME = ("step_time_s", "tokens_per_s", "mfu")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--single", type=int, default=6, help="points that simulate is asked for, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home, file = Path(name), Path(name) / "sweep.yaml"
        file.write_text(SWEEP)
        rows = [swept(file, home, "cold"), swept(file, home, "cached")]
        points = json.loads((home / "cached" / "result.json").read_text())["points"]
        fit = [point for point in points if point["status"] == "ok"]
        every = max(len(fit) // max(options.single, 1), 1)
        rows += [compared(point, home) for point in fit[::every][: options.single]]
    report("scale_sweep", [*rows, {"points": len(points), "fit": len(fit)}])


def swept(file: Path, home: Path, name: str) -> dict[str, object]:
    """One whole command."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    process = orchestrate("scale", str(file), "--out", str(home / name), home=home, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL)  # fmt: skip
    process.communicate()
    taken = time.perf_counter() - started
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    size = (home / name / "index.html").stat().st_size
    print(f"{name}: {taken:.1f} s, {cpu:.1f} s of CPU", flush=True)
    return {"what": name, "wall_s": taken, "cpu_s": cpu, "exit": process.returncode, "html_bytes": size}


def compared(point: dict[str, object], home: Path) -> dict[str, object]:
    """A point, and what `simulate` says of it."""
    degrees = [f"plan.{name}={point[f'plan_{name}']}" for name in ("dp", "tp", "pp", "zero", "schedule")]
    sets = [word for text in (*degrees, "dtype=bf16", f"microbatches={point['plan_microbatches']}")
            for word in ("--set", text)]  # fmt: skip
    process = orchestrate(
        "simulate", "--cluster", "dgx-a100", "--chips", str(point["chips"]), "--model", str(point["model"]),
        "--seq", str(SEQ), "--global-batch", str(point["global_batch"]), *sets, "--json", home=home,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    alone = json.loads(process.communicate()[0])
    is_same = all(alone[name] == point[name] for name in SAME)
    is_same &= max(alone["peak_memory_bytes"]) == point["peak_memory_bytes"]
    said = {name: point[name] for name in ("model", "mode", "chips", "plan")}
    return {"what": "single simulate", **said, "step_time_s": alone["step_time_s"], "same_figures": is_same}


if __name__ == "__main__":
    main()
