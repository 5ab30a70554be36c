"""Toy Programs: a pipeline of small matrix multiplications, made by hand, for any degrees and schedule.

They are written as text, so that a test can say in a line what it changes; `read_program` reads well-formed text.
"""

import json
import re
from collections import deque
from collections.abc import Callable, Sequence

import pytest
from hypothesis import strategies as st

from partitioner.layout.pipeline_schedules import PipelineSchedule
from partitioner.lowering.lower import with_transfers
from partitioner.program.program import (
    VERSION,
    Accumulate,
    Body,
    Call,
    Collective,
    CollectiveOp,
    Compute,
    Free,
    Group,
    Instruction,
    Operation,
    Program,
    Recv,
    Reduction,
    Role,
    Segment,
    Send,
    Tensor,
    TensorKind,
    TensorSpec,
    Update,
    Wait,
)

SEGMENTS = """
segment s0 forward
  v0 : f32[2,4]
  v1 : f32[4,4]
  v2 = aten.mm.default(v0, v1) : f32[2,4] flops=64 read=96 written=32
  v3 = aten.relu.default(v2) : f32[2,4] flops=8 read=32 written=32
  return v2 v3
segment s1 backward
  v0 : f32[2,4]
  v1 : f32[2,4]
  v2 : f32[2,4]
  v3 : f32[4,4]
  v4 = aten.mul.Tensor(v0, v1) : f32[2,4] flops=8 read=64 written=32
  v5 = aten.t.default(v2) : f32[4,2] flops=0 read=0 written=0
  v6 = aten.mm.default(v5, v4) : f32[4,4] flops=64 read=64 written=64
  v7 = aten.t.default(v3) : f32[4,4] flops=0 read=0 written=0
  v8 = aten.mm.default(v4, v7) : f32[2,4] flops=64 read=96 written=32
  return v8 v6
segment s2 loss
  v0 : f32[2,4]
  v1 = aten.ones_like.default(v0) : f32[2,4] flops=8 read=32 written=32
  return v1
segment s3 stats
  v0 = aten.zeros.default([3], dtype=dtype.f64, device=device) : f64[3] flops=0 read=0 written=24
  return v0
"""
TENSORS = """
  t0 = flat flat0.params : f32[16]
  t1 = param w : f32[4,4] shards=1:tp base=t0 source=w
  t2 = grad flat0.grads : f32[16]
  t3 = grad w.grad : f32[4,4] base=t2 source=w
  t4 = scalar local : f64[3]
  t5 = scalar stats : f64[3]
  t6 = {kind} x : f32[2,4]
  t7 = activation pre : f32[2,4]
  t8 = activation part : f32[2,4]
  t9 = activation y : f32[2,4]
  t10 = activation dy : f32[2,4]
  t11 = activation dx : f32[2,4]
  t12 = activation dw : f32[4,4]
"""


def bodies(stage: int, last: bool, dp: int) -> dict[str, list[str]]:
    """The instructions of one stage, without ids."""
    first = stage == 0
    backward = [
        *(["compute s2 t9 -> t10", "free t9"] if last else ["wait t10"]),
        "compute s1 t10 t7 t6 t1 -> t11 t12",
        "free t6 t7 t10",
        "accumulate t12 -> t3",
        "free t11 t12" if first else "free t12",
    ]
    made = {
        "recv_forward": [] if first else [f"recv t6 from {stage - 1}"],
        "forward": [
            *([] if first else ["wait t6"]),
            *("compute s0 t6 t1 -> t7 t8", "all_reduce sum tp t8 -> t9", "free t8", "wait t9"),
        ],
        "send_forward": [] if last else [f"send t9 to {stage + 1}", "free t9"],
        "recv_backward": [] if last else [f"recv t10 from {stage + 1}"],
        "backward": backward,
        "backward_last": [*backward, *(["all_reduce sum dp t2 -> t2"] if dp > 1 else [])],
        "send_backward": [] if first else [f"send t11 to {stage - 1}", "free t11"],
        "update": [
            *(["wait t2"] if dp > 1 else []),
            *("compute s3 -> t4", "all_reduce sum pp*dp*tp t4 -> t5", "wait t5"),
            "update t0 grad=t2 stats=t5 target=t0 group=0",
        ],
        "drop": ["free t6 t7 t9" if last else "free t6 t7"],
    }
    return {name: lines for name, lines in made.items() if lines}


def role_text(stage: int, pp: int, dp: int, microbatches: int, schedule: PipelineSchedule) -> str:
    """One role as text."""
    made = bodies(stage, stage == pp - 1, dp)
    names = frozenset(made)
    step = (
        *with_transfers(schedule.order(stage, pp, microbatches), names, "backward_last"),
        Call("update", 0),
    )
    evaluate: list[Call] = []
    for microbatch in range(microbatches):
        evaluate += [*with_transfers((("forward", microbatch),), names, ""), Call("drop", microbatch)]
    text = f"role {stage}\n" + TENSORS.format(kind="activation" if stage else "batch")
    number = 0
    for name, lines in made.items():
        text += f"  body {name}\n"
        for line in lines:
            text += f"    {number} {line}\n"
            number += 1
    for name, calls in (("step", step), ("evaluate", evaluate)):
        text += f"  schedule {name}: {' '.join(f'{c.body}({c.microbatch})' for c in calls)}\n"
    return text


def toy_text(
    pp: int = 2,
    microbatches: int = 3,
    dp: int = 1,
    tp: int = 1,
    schedule: PipelineSchedule = PipelineSchedule.ONE_F_ONE_B,
) -> str:
    """A whole toy Program as text."""
    head = (
        f'program v{VERSION}\naxes pp={pp} dp={dp} tp={tp}\nmicrobatches {microbatches}\nmeta model = "toy"\n'
    )
    return head + SEGMENTS + "".join(role_text(s, pp, dp, microbatches, schedule) for s in range(pp))


def toy_program(*degrees: int, schedule: PipelineSchedule = PipelineSchedule.ONE_F_ONE_B) -> Program:
    """`toy_text`, read: degrees are (pp, microbatches, dp, tp)."""
    return read_program(toy_text(*degrees, schedule=schedule))


TOKEN = re.compile(r'(?:[^\s"]|"(?:[^"\\]|\\.)*")+')
CALL = re.compile(r'("(?:[^"\\]|\\.)*"|[^\s"()]+)\((\d+)\)')
COSTS = re.compile(r"(.*) : (.*) flops=(\d+) read=(\d+) written=(\d+)")


def read_program(text: str) -> Program:
    """Inverse of `to_text`, for what it writes: text that is damaged fails somehow."""
    lines = deque(line.strip() for line in text.split("\n") if line.strip())
    assert lines.popleft() == f"program v{VERSION}"
    axes = (word.split("=") for word in lines.popleft().split()[1:])
    microbatches = int(lines.popleft().split()[1])
    meta, segments, roles = [], [], []
    while lines:
        match TOKEN.findall(lines[0]):
            case "meta", key, "=", *_:
                meta.append((unword(key), json.loads(lines.popleft().partition(" = ")[2])))
            case "segment", *_:
                segments.append(read_segment(lines))
            case _:
                roles.append(read_role(lines))
    sizes = tuple((axis, int(size)) for axis, size in axes)
    return Program(sizes, microbatches, tuple(segments), tuple(roles), tuple(meta))


def read_segment(lines: deque[str]) -> Segment:
    _, number, name = TOKEN.findall(lines.popleft())
    inputs, ops = [], []
    while not lines[0].startswith("return"):
        left, _, right = lines.popleft().partition(" : ")
        if " = " in left:
            value, _, costed = f"{left} : {right}".partition(" = ")
            code, made, *costs = COSTS.fullmatch(costed).groups()
            is_tuple = made.startswith("(")
            specs = made.strip("()").split(", ") if made not in ("none", "()") else []
            ops.append(Operation(code, tuple(map(read_spec, specs)), is_tuple, *map(int, costs)))
        else:
            value = left
            inputs.append(read_spec(right))
        assert number_in(value) == len(inputs) + len(ops) - 1
    outputs = tuple(map(number_in, lines.popleft().split()[1:]))
    return Segment(number_in(number), unword(name), tuple(inputs), tuple(ops), outputs)


def read_role(lines: deque[str]) -> Role:
    stage = int(lines.popleft().split()[1])
    tensors, bodies, schedules = [], [], []
    while lines and lines[0].startswith("t"):
        tensors.append(read_tensor(*TOKEN.findall(lines.popleft())))
    while lines and lines[0].startswith("body "):
        name, instructions = unword(lines.popleft().removeprefix("body ")), []
        while lines and lines[0][0].isdigit() and not is_calls(lines[0]):
            number, *words = TOKEN.findall(lines.popleft())
            instructions.append(read_instruction(int(number), *words))
        bodies.append(Body(name, tuple(instructions)))
    while lines and lines[0].startswith("schedule "):
        head, *text = re.split(r"(?<=:)(?: |$)", lines.popleft().removeprefix("schedule "), maxsplit=1)
        while lines and is_calls(lines[0]):
            text.append(lines.popleft())
        found = CALL.findall(" ".join(text))
        calls = tuple(Call(unword(body), int(microbatch)) for body, microbatch in found)
        schedules.append((unword(head[:-1]), calls))
    return Role(stage, tuple(tensors), tuple(bodies), tuple(schedules))


def is_calls(line: str) -> bool:
    return CALL.sub("", line).strip() == ""


def read_tensor(number: str, _: str, kind: str, name: str, __: str, spec: str, *more: str) -> Tensor:
    options = dict(word.split("=", 1) for word in more)
    cuts = (cut.split(":") for cut in options["shards"].split(",")) if "shards" in options else ()
    return Tensor(
        id=number_in(number), name=unword(name), kind=TensorKind(kind), spec=read_spec(spec),
        shards=tuple((int(dim), axis) for dim, axis in cuts),
        base=number_in(options["base"]) if "base" in options else None,
        offset=int(options.get("offset", 0)), source=unword(options.get("source", "")),
    )  # fmt: skip


def read_instruction(number: int, verb: str, *words: str) -> Instruction:
    """An instruction from the words of its line."""
    arrow = words.index("->") if "->" in words else 0
    match verb:
        case "compute":
            reads, writes = ids(words[1:arrow]), ids(words[arrow + 1 :])
            return Compute(number, number_in(words[0]), reads, writes)
        case "accumulate":
            return Accumulate(number, ids(words[:arrow]), ids(words[arrow + 1 :]))
        case "send":
            return Send(number, number_in(words[0]), int(words[2]))
        case "recv":
            return Recv(number, number_in(words[0]), int(words[2]))
        case "wait":
            return Wait(number, ids(words))
        case "free":
            return Free(number, ids(words))
        case "update":
            param, grad, stats, target = (number_in(word.rpartition("=")[2]) for word in words[:4])
            return Update(number, param, grad, stats, target, int(words[4].partition("=")[2]))
    op, has_reduction = CollectiveOp(verb), words[0] in tuple(Reduction)
    reduction = Reduction(words[0]) if has_reduction else Reduction.NONE
    axes, _, stages = words[has_reduction].partition("@")
    group = Group(
        tuple(axes.split("*")) if axes != "-" else (), tuple(map(int, stages.split("+"))) if stages else ()
    )
    written = [word for word in words[arrow + 1 :] if word.startswith("t")]
    dim = int(words[-1].removeprefix("dim=")) if words[-1].startswith("dim=") else 0
    return Collective(number, op, reduction, group, dim, ids(words[has_reduction + 1 : arrow]), ids(written))


def read_spec(text: str) -> TensorSpec:
    dtype, _, sizes = text.removesuffix("]").partition("[")
    return TensorSpec(tuple(map(int, sizes.split(","))) if sizes else (), dtype)


def number_in(word: str) -> int:
    return int(word[1:])


def ids(words: Sequence[str]) -> tuple[int, ...]:
    return tuple(map(number_in, words))


def unword(text: str) -> str:
    return str(json.loads(text)) if text.startswith('"') else text


@pytest.fixture(scope="session", name="from_text")
def reader_of_programs() -> Callable[[str], Program]:
    return read_program


@pytest.fixture(scope="session", name="read_instruction")
def reader_of_instructions() -> Callable[..., Instruction]:
    return read_instruction


@pytest.fixture(scope="session")
def text_of() -> Callable[..., str]:
    return toy_text


@pytest.fixture(scope="session")
def toy() -> Callable[..., Program]:
    return toy_program


@pytest.fixture(scope="session")
def programs() -> st.SearchStrategy[Program]:
    """Valid Programs of any shape that a test can afford."""
    degree = st.integers(1, 3)
    return st.builds(
        toy_program,
        st.integers(1, 4),
        st.integers(1, 5),
        degree,
        degree,
        schedule=st.sampled_from(PipelineSchedule),
    )


@pytest.fixture(scope="session")
def specs() -> st.SearchStrategy[TensorSpec]:
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    return st.builds(TensorSpec, shapes, st.sampled_from(["f64", "f32", "bf16", "i64", "b8"]))
