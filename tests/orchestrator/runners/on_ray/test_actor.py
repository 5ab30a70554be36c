import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.optimizers import OptimizerSpec
from orchestrator.runners.on_ray.actor import factory, marks_from, marks_tensor
from orchestrator.runs.timeline import Mark

numbers = st.integers(0, 2**40)


@given(
    st.lists(st.builds(Mark, numbers, numbers, numbers, numbers, numbers, numbers), max_size=5),
    st.integers(-(2**40), 2**40),
)
def test_marks_come_back_on_the_drivers_clock(marks, offset_ns):
    moved = marks_from(marks_tensor(marks), offset_ns)
    assert moved == tuple(
        Mark(m.chip, m.call, m.microbatch, m.instruction, m.start_ns + offset_ns, m.end_ns + offset_ns)
        for m in marks
    )


def test_an_optimizer_is_a_specification_or_a_name():
    spec = OptimizerSpec()
    assert factory(spec) is spec
    assert factory("torch.optim:Adagrad") is torch.optim.Adagrad
