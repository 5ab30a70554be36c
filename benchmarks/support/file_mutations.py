"""Files that users hand over, and what a slip of the hand, a bad disk or a bad mind makes of them.

`seeds` are files that are read: all that is shipped, and some that use every key. `mutated` changes one of them in one
of the ways of MUTATIONS, up to three times; the same number gives the same bytes.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from partitioner.layout.parallel_plan import Plan, plan_to_yaml
from partitioner.layout.pipeline_schedules import PipelineSchedule

ROOT = Path(__file__).parents[2]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
LONGEST = 20_000  # characters in which words are looked for


class FileKind(StrEnum):
    """Who reads a file."""

    CHECKED = "cluster, chip and job"
    PLAN = "plan"
    SCHEDULE = "schedule"
    TABLE = "measured table"
    PARTS = "table of parts"


@dataclass(frozen=True, slots=True)
class Seed:
    """A file that is read as it is."""

    kind: FileKind
    name: str
    text: str


_HEAD = "kind: cluster\nversion: 1\nname: seed\ndevice: simulated\n"
_CLUSTERS = {
    "rails": _HEAD + """repeat: any
hosts:
  - count: 2
    chips: [{like: nvidia_h100_sxm, count: 8}]
    pcie: {switches: 4}
    nics: {count: 8, bandwidth: 400 Gb/s, latency: 1.3 us, efficiency: 0.95, duplex: full}
    power: 4.6 kW
    price: 12 USD/h
scale_up: {reduces: true, setup: 3 us, protocols: [{name: nccl, latency: 0.56 us, share: 0.783, pipelined: true}]}
scale_out:
  - {name: rack, hosts: 32, rails: true}
  - {name: spine, hosts: any, latency: 2 us, oversubscription: 2, paths: 2, spread: hashed}
""",
    "edges": _HEAD + """hosts:
  - chips: [{like: nvidia_a100_sxm_80gb, count: 4}]
scale_up:
  domain: 4
  bandwidth: 50 GB/s
  latency: 1 us
  edges: [{a: 0, b: hub}, {a: 1, b: hub, bandwidth: 25 GB/s}, {a: 2, b: hub, duplex: half}, {a: 3, b: hub}]
  through_chips: false
conditions:
  seed: 7
  links: [{chip: 1, tier: scale-up, factor: 0.5}, {chip: [0, 2-3], tier: scale-up, factor: 0.9}]
  chips: [{chip: 3, slowdown: 1.3, delay: 5 us}]
  jitter: {rate: 5 %, delay: 1 us}
  background: [{op: all_to_all, chips: 0-3, size: 16 MiB}]
""",
    "torus": _HEAD + """repeat: 4
hosts:
  - chips: [{like: google_tpu_v5p, count: 4}]
scale_up: {shape: torus, dims: [4, 4], links: [{latency: 1 us}, {bandwidth: 90 GB/s, latency: 2 us}]}
conditions:
  links: [{chip: 7, tier: scale-up, flaps: {down: 5 ms, every: 100 ms, first: 0 s}}]
""",
    "dragonfly": _HEAD + """repeat: 16
hosts:
  - chips: [{like: intel_gaudi3, count: 2}]
    pcie: {switches: 0, bandwidth: 32 GB/s, efficiency: 0.8, root: {latency: 3 us}}
    nics: {count: 2, bandwidth: 200 Gb/s, latency: 2 us}
scale_out: [{name: fly, shape: dragonfly, dims: [2, 4, 4], long_links: 1, routing: minimal, latency: 2 us}]
""",
    "own chip": _HEAD.replace("simulated", "cpu") + """actors: 2
hosts:
  - chips:
      - name: mine
        class: asic
        peak: {bf16: {value: 100 TFLOP/s, source: a guess}, fp32: 10 TFLOP/s}
        memory: {capacity: 32 GB, bandwidth: 1 TB/s, type: hbm}
        sram: {capacity: 100 MB, bandwidth: 10 TB/s}
        cores: {count: 120, clock: 1.4 GHz}
        noc: {topology: mesh, shape: mesh, dims: 10 x 12, hop_latency: 1 ns, hop_bandwidth: 64 GB/s, multicast: 'yes'}
        host_link: {type: PCIe, bandwidth: 32 GB/s, latency: 1 us, efficiency: 0.9}
        efficiency: {matmul: 0.7, memory: 0.9}
        count: 8
    pcie: {switches: 2, uplink: 40 GB/s}
""",
}  # fmt: skip
_JOBS = {
    "all keys": """kind: job
version: 1
model: builtin:gpt-mini
model_args: {layers: 2}
data: builtin:english
seq: 64
global_batch: 32
microbatches: 4
steps: 100
seed: 1
dtype: bf16
optimizer: {name: adamw, lr: 3e-4, weight_decay: 0.1, betas: [0.9, 0.95], eps: 1e-8}
clip_norm: 1.0
lr_schedule: {name: cosine, warmup_steps: 20, min_lr_ratio: 0.1}
plan: {dp: 2, tp: auto, pp: 1, zero: 1, schedule: 1f1b, batch_norm: per_part}
validation: {every: 10, batches: 2}
checkpoints: {every: 50, keep: 3}
""",
    "own code": """kind: job
version: 1
model: mine.py:Net
data: mine.py:samples
data_args: {path: here}
data_gives: samples
shuffle: false
drop_last: true
loss: mine.py:loss
loss_args: {weight: 2}
optimizer: {name: torch.optim:SGD, lr: 0.1, args: {nesterov: true}}
lr_schedule: {name: mine.py:schedule, args: {steps: 20}}
validation: {data: mine.py:held_out, every: 10}
""",
}
_TABLE = """# nThread 1 nGpus 8 minBytes 1024 maxBytes 4096 step: 2(factor) warmup iters: 1 iters: 20 agg iters: 1
# Collective test starting: all_reduce_perf
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)             (us)  (GB/s)  (GB/s)
        1024           256     float     sum      -1    20.40    0.05    0.09       0    20.00    0.05    0.09       0
     1048576        262144     float     sum      -1    52.00   20.16   35.29       0    50.00   20.97   36.70       0
"""
_SCHEDULE = """# Two ranks add what they have.
op all_reduce
algorithm mine
ranks 2
chunks 2
shares 0.5 0.5
channel pieces 4 order interleaved by_chunk
phase
round 0: 0 -> 1 chunk 0 reduce
round 0: 1 -> 0 chunk 1 reduce
round 1: 0 -> 1 chunk 1
round 1: 1->0 chunks 0-0 copy
"""
_CSV = "# a run\nop,chips,size (KiB),time_us\nall_reduce,8,1,20.4\nall_reduce,8,1024,52\n"


def seeds() -> Iterator[Seed]:
    """All of them, in an order that stays."""
    for folder in ("cluster_configs", "kernels/catalog"):
        for path in sorted((ROOT / folder).glob("*.yaml")):
            yield Seed(FileKind.CHECKED, path.stem, path.read_text(encoding="utf-8"))
    for name, text in (_CLUSTERS | _JOBS).items():
        # As often as all that is shipped: these have what goes wrong most.
        yield from [Seed(FileKind.CHECKED, name, text)] * 8
    plans = (Plan(), Plan(2, 2, 2, 1, PipelineSchedule.GPIPE, 4, (3, 4)), Plan(dp=8, zero=1))
    yield from [Seed(FileKind.PLAN, str(plan), plan_to_yaml(plan)) for plan in plans] * 4
    yield from [Seed(FileKind.SCHEDULE, "schedule", _SCHEDULE)] * 12
    yield from [Seed(FileKind.TABLE, "nccl-tests", _TABLE), Seed(FileKind.TABLE, "CSV", _CSV)] * 4
    yield from [Seed(FileKind.PARTS, "parts", "0,1 KiB\n1024,0\n")] * 4


ODD = [
    "", "~", "null", "true", "yes", "NaN", ".nan", ".inf", "-.inf", "nan", "inf", "Infinity", "1e400", "-1", "0",
    "-0.0", "0.5", "1e3", "1_000", "010", "1:30", "0x10", "0b1", "0o7", "2026-01-01", "2026-13-45", "!!int ''",
    "!!float x", "!!bool ''", "!!null x", "!!binary '='", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]",
    "!!python/name:os.system", "!!timestamp 1", "!!str 5", "!!int 5", "!!float 5", "!mine 5", "9" * 5000,
    "9" * 4300, "9" * 400, "1" + "_0" * 3000, "65536", "65537", "100000", "100000000", "1000000000", str(2**31),
    str(2**63), str(2**64), "1e18", "1e308", "5e-324", "[]", "{}", "[[]]", "{a: {}}", "[1, 2]", "{value: 1}",
    "{value: 5 us, source: x}", "'", '"', "\0", "\x85", "\u2028", "\U0001f600", "\u0665", "\u202e", "\ufeff", "*a",
    "&a", "{<<: *a}", "%YAML 9.9", "---", "...", "|", ">", "?", "- - - -", "file.py:name", "hf:x", "builtin:gpt-mini",
    "1e-30 us", "1e300 GB/s", "0 GB", "-1 us", "5 parsecs", "80 gb", "1 B", "1e-400 s", "99999999999999999999 EB",
    "1e999999999999 GB", "0-999999999", "0-0", "[0-100, 5]", "chip 9999999", "chip " + "9" * 5000, "auto", "any",
    "5 %", "100 %", "1 us", "1 GB/s", "1 TFLOP/s", "2 x 3", "999999 x 999999", "0 x 0", "mesh", "ring", "full mesh",
    "dragonfly", "switch", "torus", "hashed", "half", "one way", "nvidia_h100_sxm", "simulated", "cuda", "all_reduce",
]  # fmt: skip
_TOKEN = re.compile(r"[^\s,:\[\]{}#]+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_UNITS = (
    "us",
    "ns",
    "s",
    "ms",
    "GB/s",
    "Gb/s",
    "GiB",
    "GB",
    "B",
    "W",
    "kW",
    "USD/h",
    "USD",
    "TFLOP/s",
    "GHz",
    "%",
)
_UNIT = re.compile(rf"(?<=\d )(?:{'|'.join(_UNITS)})")


def _bytes(draw: random.Random, text: str) -> str:
    data = bytearray(_encoded(text))
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(len(data) + 1)
        match draw.randrange(4):
            case 0:
                data[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                data.insert(place, draw.choice(b"\x00\t\r\n:-[]{}'\"&*!|>%@`#,? \xff\xc3"))
            case 2:
                del data[place : place + draw.choice((1, 4, 64))]
            case _:
                data = data[:place] if draw.random() < 0.2 else data
    return data.decode("utf-8", "surrogateescape")


def _lines(draw: random.Random, text: str) -> str:
    lines = text.split("\n")
    one, two = draw.randrange(len(lines)), draw.randrange(len(lines))
    match draw.randrange(6):
        case 0:
            del lines[one]
        case 1:
            lines.insert(two, lines[one])
        case 2:
            lines[one], lines[two] = lines[two], lines[one]
        case 3:
            lines[one] = " " * draw.choice((1, 2, 4)) + lines[one]
        case 4:
            lines[one] = lines[one].lstrip()
        case _:
            low, high = sorted((one, two))
            lines = lines[:low] + lines[high:] + lines[low:high]
    return "\n".join(lines)


def _replaced(pattern: re.Pattern[str], text: str, draw: random.Random, word: Callable[[str], str]) -> str:
    """One match of the pattern by another word."""
    if not (matches := list(pattern.finditer(text))):
        return text
    match = draw.choice(matches)
    return text[: match.start()] + word(match.group()) + text[match.end() :]


def _tokens(draw: random.Random, text: str) -> str:
    others = _TOKEN.findall(text) or [""]
    return _replaced(_TOKEN, text, draw, lambda _: draw.choice(others))


def _values(draw: random.Random, text: str) -> str:
    pattern = draw.choice((re.compile(r"(?<=: )[^\n{}\[\],]+"), _TOKEN))
    return _replaced(pattern, text, draw, lambda _: draw.choice(ODD))


def _numbers(draw: random.Random, text: str) -> str:
    factors = (
        "{}0",
        "{}00000",
        "{}0000000000",
        "-{}",
        "0.{}",
        "{}.5",
        "{}e9",
        "{}e-9",
        "{}e400",
        "0",
        "1",
        "2",
        "3",
    )
    return _replaced(_NUMBER, text, draw, lambda number: draw.choice(factors).format(number))


def _units(draw: random.Random, text: str) -> str:
    return _replaced(_UNIT, text, draw, lambda _: draw.choice((*_UNITS, "", "gb", "Kib/s", "us us")))


def _keys(draw: random.Random, text: str) -> str:
    keys = re.compile(r"\w+(?=:)")
    others = keys.findall(text) or ["a"]
    new = draw.choice((draw.choice(others), draw.choice(ODD), "source", "? [a, b]\n", "<<"))
    return _replaced(keys, text, draw, lambda key: draw.choice((new, key[:-1], key.upper(), key + key)))


def _marks(draw: random.Random, text: str) -> str:
    """Tags, anchors, aliases."""
    mark = draw.choice(
        ("!!int", "!!float", "!!str", "!!null", "!!set", "!!map", "!!seq", "!!binary", "!x", "&a", "*a")
    )
    after = re.compile(r"(?<=: )|(?<=- )|(?<=\[)")
    return _replaced(after, _replaced(after, text, draw, lambda _: f"{mark} "), draw, lambda _: f"{mark} ")


def _large(draw: random.Random, text: str) -> str:
    depth = draw.choice((10, 60, 70, 1000, 100_000))
    bomb = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else 'x'] * 9)}]\n" for i in range(12))
    big = draw.choice((
        "[" * depth, "[" * depth + "]" * depth, "{a: " * depth + "}" * depth, "- " * depth, "x" * 10 * depth,
        "[" + "1, " * depth + "]", "[" + "{}, " * depth + "]", "{" + "".join(f"k{i}: 1, " for i in range(depth)) + "}",
        "1" + ":00" * depth, "0b" + "1" * depth, "\n" * depth,
    ))  # fmt: skip
    match draw.randrange(4):
        case 0:
            return text + bomb
        case 1:
            return bomb + text.replace("]", "*b5]", 1)
        case 2:
            return text + f"\nbig: {big}\n"
        case _:
            return _replaced(re.compile(r"(?<=: )[^\n{}\[\],]+"), text, draw, lambda _: big)


def _structure(draw: random.Random, text: str) -> str:
    """A part of the document taken out, put elsewhere, wrapped or repeated."""
    if "*" in text:  # what aliases stand for may be endless
        return _lines(draw, text)
    try:
        root: Any = yaml.load(text, Loader=LOADER)
        places = list(_places(root))
        (holder, key), (other, target) = draw.choice(places), draw.choice(places)
        match draw.randrange(7):
            case 0:
                del holder[key]
            case 1:
                other[target] = holder[key]
            case 2:
                holder[key], other[target] = other[target], holder[key]
            case 3:
                holder[key] = draw.choice(([holder[key]], {"value": holder[key]}, {key: holder[key]}))
            case 4 if isinstance(holder[key], list):
                holder[key] *= draw.choice((0, 2, 1000))
            case 5:
                holder[key] = draw.choice(
                    (None, True, 0, -1, 1.5, "", [], {}, float("nan"), 10 ** draw.randrange(20))
                )
            case _:
                holder[key] = yaml.load(draw.choice(ODD), Loader=LOADER)
        return yaml.safe_dump(root, sort_keys=draw.random() < 0.3, allow_unicode=True)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, RecursionError, AttributeError):
        return _lines(draw, text)


def _places(part: object) -> Iterator[tuple[Any, Any]]:
    inner = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for key, value in list(inner):
        yield part, key
        yield from _places(value)


MUTATIONS: Mapping[str, Callable[[random.Random, str], str]] = {
    "bytes": _bytes, "lines": _lines, "tokens": _tokens, "values": _values, "numbers": _numbers, "units": _units,
    "keys": _keys, "tags and aliases": _marks, "structure": _structure, "large": _large,
}  # fmt: skip


def mutated(number: int, known: list[Seed]) -> tuple[Seed, str, bytes]:
    """The seed, how it was changed, and what became of it; the same for the same number."""
    draw = random.Random(number)
    seed, ways = draw.choice(known), draw.choices(list(MUTATIONS), k=draw.choice((1, 1, 2, 3)))
    text = seed.text
    for way in ways:
        text = MUTATIONS[way if len(text) <= LONGEST else draw.choice(("bytes", "lines"))](draw, text)
    return seed, " + ".join(ways), _encoded(text)


def _encoded(text: str) -> bytes:
    """Bytes that are not UTF-8 travel through text as surrogates; others of those stand for such bytes too."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
