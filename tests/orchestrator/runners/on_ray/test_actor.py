from hypothesis import given
from hypothesis import strategies as st

from orchestrator.runners.on_ray.actor import marks_from, marks_tensor
from orchestrator.runs.timeline import Mark

numbers = st.integers(0, 2**40)


@given(st.lists(st.builds(Mark, numbers, numbers, numbers, numbers, numbers, numbers), max_size=5))
def test_marks_come_back(marks):
    assert marks_from(marks_tensor(marks)) == marks
