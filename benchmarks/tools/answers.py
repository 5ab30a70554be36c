"""Answers: what the command line answers to a fixed list of commands, so that two versions of the code compare.

python benchmarks/tools/answers.py record FOLDER [--source ROOT] [--only TEXT]
python benchmarks/tools/answers.py compare FOLDER FOLDER     # also two folders like benchmarks/results

One file per command: exit code, stdout, the files of its run directory, warnings, or all of stderr where it failed.
Both on one machine: the last bits of training hang on its libraries and its number of threads.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise, product
from pathlib import Path

WORKERS, TIMEOUT_S, SHOWN, WIDTH = 2, 240, 5, 200
# What of "ANSWER.KEY = VALUE" is not an answer, and why. Absolute paths are named when they are recorded.
IGNORED = (
    (r"\.(elapsed|loading)_s = | made in +[\d.]+ ", "how long a prediction took to make"),
    (r"^(train\S*inline|default_run|throughput)\S*\.(tokens_per_s|step_time_s) ", "speed of this machine"),
    (r"^train\S*inline\S*\.files\.(log|measured|trace|timeline)\.", "show the measured step"),
    (r"\.accuracy\.kinds\.\S*(measured_\w+|error) = ", "of the measured step"),
    (r"^(comms_scale|verify_matrix)\S*\.seconds |\.(whole_command|folded|full|ours)_s = ", "wall clock"),
    (r"\.(median|worst|simulate_alone|to_find|load|compile)_s = ", "wall clock"),
    (r"\.(messages_per_s|flow_events_per_s|over_1024|over_plain|\w+_round) = ", "quotients of wall clocks"),
    (r"\.rss_mb = |^\w+\.(cores|python) = ", "memory and kind of this machine"),
)
PHASE = re.compile(r" *[\w -]+(\(.*\))?( \.\.\.|: [\d.]+ \w+)")  # said only where it lasts

CLUSTERS = """{cerebras-cs3 --chips 4|cpu|dgx-a100 --chips 64|dgx-h100-superpod --chips 512|graphcore-pod64 --chips 128
|jetson-edge|laptop|pcie-workstation|tenstorrent-galaxy|tpu-v5p-pod --chips 320|two-host-ethernet}"""
OPS = "{all_reduce|all_gather|reduce_scatter|all_to_all|broadcast|reduce|gather|scatter|barrier}"
ASKED = "{plan --run-dir RUN|simulate --fidelity folded|simulate --fidelity full} --cluster"
# A line, with those below that start with |, is a command for each choice of its {a|b}: in order, sharing a cache.
COMMANDS = f"""
{ASKED} {{laptop|cpu|cerebras-cs3 --chips 4 --model builtin:gpt-2.7b --set dtype=bf16
|laptop --set plan.tp=2 --set plan.pp=2 --set optimizer.name=sgd --set dtype=fp64
|laptop --set plan.pp=8 --set microbatches=16 --model builtin:gpt-10m
|jetson-edge --model builtin:gpt-small --set plan.pp=4
|dgx-h100-superpod --model hf:llama3-8b --chips 16 --seq 2048 --global-batch 64 --set dtype=bf16}}
{ASKED} {{dgx-a100 --chips 24 --model builtin:gpt-small|graphcore-pod64 --chips 192 --set plan.tp=2
|pcie-workstation --model builtin:gpt-medium --set plan.tp=4|hurt.yaml --set plan.tp=4|edges.yaml --set plan.pp=2
|tenstorrent-galaxy --model builtin:gpt-1.3b --set plan.tp=4 --set plan.pp=2 --set dtype=bf16
|two-host-ethernet --model hf:gpt2 --set plan.tp=2 --set plan.zero=1}} --global-batch 192
{{plan|simulate --run-dir RUN}} --cluster {{dgx-a100 --chips 1280 --model builtin:gpt-175b --seq 2048
|dgx-h100-superpod --chips 512 --model hf:llama3-70b --set plan.pp=8 --set plan.dp=8
|tpu-v5p-pod --chips 320 --model builtin:gpt-13b --set plan.tp=4 --set plan.zero=1}} --set dtype=bf16 --global-batch 640
plan --run-dir RUN --set plan.tp=2 --set {{microbatches=2 --set plan.dp=4 --set plan.zero=1
|plan.pp=2 --set plan.schedule=gpipe}} --model {{builtin:gpt-nano|builtin:gpt-mini|hf:gpt2-tiny|hf:llama-tiny}}
verify --seq 16 --global-batch 8 {{--set dtype=fp64 --model builtin:gpt-nano --chips 8 --set plan.tp=4 --set plan.pp=2
|--model hf:gpt2-tiny --chips 4 --set plan.dp=2 --set plan.tp=2 --set plan.zero=1}}
train --runner inline {{--steps 2 --run-dir run0|--resume run0|--resume nowhere
|--steps 2 --run-dir RUN --model hf:llama-tiny --set plan.tp=2 --set optimizer.name=sgd}}
comms --cluster {{dgx-h100-superpod --chips 32 --fidelity full|torus.yaml}} --algorithm "{{ring|bidirectional ring|torus
|halving-doubling|recursive doubling|direct|two-shot|bruck|double tree|hierarchical ring|torus tree|rotated torus
|hierarchical ring, double tree|in-network|rail rings|hierarchical in-network, double tree}}"
comms --cluster {CLUSTERS} --op {OPS}
comms --cluster {{dgx-a100 --chips 24|dgx-h100-superpod --chips 272}} --op {OPS}
comms --cluster {{torus.yaml|pairs.yaml|dragonfly.yaml|edges.yaml|hurt.yaml}} --op {{all_reduce|all_to_all|gather
|all_reduce --tiers|all_gather --algorithm synthesized}}
comms --cluster {CLUSTERS} {{--sweep 1KiB..1GiB|--sweep 1KiB..16MiB --op all_to_all|--tiers
|--size 1MiB --fidelity full}}
comms {{--op foo|--size 3|--algorithm nope|--cluster dgx-a101|--fidelity blah|--op barrier --sweep 1KiB..1MiB|--chips 6
|--algorithm synthesized|--chips 4 --op all_to_allv --size parts.csv|--op all_to_allv --size parts.csv}}
calibrate links {{rings.csv|rings.csv --op all_reduce --chips 8 --cluster dgx-a100|nccl.txt --chips 8|parts.csv}}
check {{FILES|pairs.yaml|hurt.yaml|broken.yaml|parts.csv|absent.yaml}}
{{plan --run-dir mine|simulate --plan mine/plan.yaml|simulate --run-dir mine|train --dry-run|plan --plan broken.yaml
|plan --set plan.dp=3|plan --set dtype=int8|plan --set seq|plan --set microbatches=64|plan --model builtin:gpt-13b
|plan --model builtin:gpt-huge|simulate --job broken.yaml|simulate --cluster dgx-a100 --chips 4096 --fidelity full}}
text {{plan|simulate|comms --sweep 1MiB..4MiB|comms --tiers|comms|calibrate links rings.csv|check torus.yaml}}
text {{|check|plan|simulate|train|verify|comms|calibrate|doctor}} --help
"""

MADE = """{kind: cluster, version: 1, name: made, device: simulated, hosts: [{chips: [{like: nvidia_a100_sxm_80gb,
  count: 8}]}], scale_up: {bandwidth: 50 GB/s, latency: 1 us, %s}}"""
EDGES = ", ".join(f"{{a: {chip}, b: {chip + 1}, back: {{bandwidth: 20 GB/s}}}}" for chip in range(7))
HURT = """switch}, conditions: {jitter: {rate: 5 %, delay: 1 us}, background: [{op: all_reduce, chips: 4-7, size: 8 MiB}
  ], chips: [{chip: 2, slowdown: 1.5}], links: [{chip: 3, tier: scale-up, flaps: {down: 1 ms, every: 5 ms}}]"""
MEASURED = [(2**n, 30 + 2**n * (1 + n % 3 / 50) / 2e5) for n in range(12, 30)]
INPUTS = {
    "torus.yaml": MADE % "shape: torus, dims: [2, 4], links: [{bandwidth: 30 GB/s}, {latency: 3 us}]",
    "pairs.yaml": MADE % "shape: full mesh, duplex: half",
    "dragonfly.yaml": MADE % "shape: dragonfly, dims: [1, 2, 4], long_links: 2, routing: valiant",
    "edges.yaml": MADE % f"edges: [{EDGES}, {{a: 0, b: 4, duplex: half}}, {{a: 3, b: 7}}]",
    "hurt.yaml": MADE % f"shape: {HURT}",
    "broken.yaml": MADE % "shape: rang, dimms: 3",
    "parts.csv": "0,1MiB,2MiB,3MiB\n4MiB,0,0,1\n5,6,0,7\n1KiB,2,3,0\n",
    "rings.csv": "size,time_us\n" + "".join(f"{size},{us:.4f}\n" for size, us in MEASURED),
    "nccl.txt": "# all_reduce_perf\n# size count type redop root time algbw busbw #wrong time algbw busbw #wrong\n"
    + "".join(f"{size} {size // 4} float sum -1 {us:.3f} 0 0 0 {us:.3f} 0 0 0\n" for size, us in MEASURED),
}


def commands(source: Path) -> list[list[str]]:
    """By line: one for each choice of each {a|b}. FILES are the clusters and some of the chips that `source` ships."""
    files = (*sorted(source.glob("cluster_configs/*")), *sorted(source.glob("kernels/catalog/[agt]*")))
    text = COMMANDS.replace("FILES", "|".join(f"SOURCE/{path.relative_to(source)}" for path in files))
    lines = [re.split("[{}]", line) for line in text.replace("\n|", "|").strip().splitlines()]
    choices = [[part.split("|") if at % 2 else [part] for at, part in enumerate(line)] for line in lines]
    return [["".join(picked) for picked in product(*parts)] for parts in choices]


def record(folder: Path, source: Path, only: str) -> None:
    """Run all lines, or those that have a command with `only` in it."""
    folder.mkdir(parents=True)
    lines = [line for line in commands(source) if any(only in command for command in line)]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(WORKERS) as pool:
        homes = (Path(scratch) / f"home{at}" for at in range(len(lines)))
        list(pool.map(partial(record_line, folder, source), homes, lines))


def record_line(folder: Path, source: Path, home: Path, line: list[str]) -> None:
    """Run the commands of a line with a home of their own, which holds what they read."""
    home.mkdir()
    for name, text in INPUTS.items():
        (home / name).write_text(text)
    for at, command in enumerate(line):
        words = shlex.split(command.replace("RUN", f"run{at}").replace("SOURCE", str(source)))
        answer = answered(words[1:] if words[0] == "text" else [*words, "--json"], home, source)
        text = json.dumps(answer, indent=1).replace(str(source), "SOURCE").replace(str(home), "HOME")
        (folder / (re.sub(r"( |--set|--|[^\w.=])+", "-", command) + ".json")).write_text(f"{text}\n")
    print(f"{len(line):3} like  {line[0]}", flush=True)


def answered(words: list[str], home: Path, source: Path) -> dict[str, object]:
    """Exit code, stdout, stderr and the files of a command's run directory."""
    own = {"HOME": str(home), "XDG_CACHE_HOME": f"{home}/.cache", "PYTHONPATH": str(source), "COLUMNS": "120"}
    command = [sys.executable, "-c", "from orchestrator.cli import main; main()", *words]
    done = subprocess.run(command, cwd=home, env=os.environ | own, capture_output=True, timeout=TIMEOUT_S)
    said = [line.rstrip() for line in done.stderr.decode().splitlines() if not PHASE.fullmatch(line)]
    runs = [home / word for flag, word in pairwise(words) if flag in ("--run-dir", "--resume")]
    files = sorted(path for run in runs for path in run.rglob("*") if path.is_file())
    return {
        "exit_code": done.returncode,
        "stdout": read(done.stdout),
        "stderr": said if done.returncode else [line for line in said if line.startswith("warning")],
        "files": {path.name: read(path.read_bytes()) for path in files},
    }


def read(content: bytes) -> object:
    """JSON as values, text by lines, anything else as a digest."""
    try:
        if content.startswith(b"{") and content.find(b"\n{") < 0:
            return json.loads(content)
        lines = content.decode().rstrip().splitlines()
        return [json.loads(line) if line.startswith("{") else line.rstrip() for line in lines]
    except ValueError:
        return hashlib.sha256(content).hexdigest()


def flat(value: object, key: str) -> dict[str, str]:
    """Every value inside by its key, as text, without what is ignored."""
    inner = dict(enumerate(value)) if isinstance(value, list) else value
    if inner and isinstance(inner, dict):
        return {k: v for name, each in inner.items() for k, v in flat(each, f"{key}.{name}").items()}
    line = f"{key} = {value!r}"
    return {} if any(re.search(pattern, line) for pattern, _ in IGNORED) else {key: repr(value)}


def compare(before: Path, after: Path) -> int:
    """Print what differs; 0 if there are answers and nothing does."""
    names = sorted({path.name for folder in (before, after) for path in folder.glob("*.json")})
    differing = 0
    for name in names:
        paths = (before / name, after / name)
        old, new = (flat(json.loads(at.read_text()), at.stem) if at.is_file() else {} for at in paths)
        keys = [key for key in old | new if old.get(key) != new.get(key)]
        differing += bool(keys)
        for key in keys[:SHOWN]:
            print(f"{key}, one of {len(keys)}: {old.get(key, '-')[:WIDTH]} -> {new.get(key, '-')[:WIDTH]}")
    print(f"{differing} of {len(names)} answers differ" if differing else f"{len(names)} answers equal")
    return 1 if differing or not names else 0


def main() -> int:
    """Do what is asked; `make bench` asks nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("verb", nargs="?", choices=("record", "compare"))
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--source", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    if given.verb == "compare":
        return compare(*given.folders)
    if given.verb == "record":
        record(given.folders[0], given.source.resolve(), given.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
