"""Toy Programs: a pipeline of small matrix multiplications, made by hand, for any degrees and schedule."""

from collections.abc import Callable

import pytest
from hypothesis import strategies as st

from partitioner.layout.pipeline_schedules import PipelineSchedule
from partitioner.lowering.lower import with_transfers
from partitioner.program.program import Call, Program, TensorSpec
from partitioner.program.program_text import from_text

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
            "update t0 grad=t2 stats=t5 target=t0 decay",
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
    head = f'program v1\naxes pp={pp} dp={dp} tp={tp}\nmicrobatches {microbatches}\nmeta model = "toy"\n'
    return head + SEGMENTS + "".join(role_text(s, pp, dp, microbatches, schedule) for s in range(pp))


def toy_program(*degrees: int, schedule: PipelineSchedule = PipelineSchedule.ONE_F_ONE_B) -> Program:
    """`toy_text`, read: degrees are (pp, microbatches, dp, tp)."""
    return from_text(toy_text(*degrees, schedule=schedule))


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
