"""Random models under random plans: what a plain PyTorch loop gives, or refused (thousands: `benchmarks/exactness`)."""

import pytest
from exactness.equal_training import WRONG, ended_by_number

FIRST, CASES = 77_000_000, 24  # numbers that no rule was made for


@pytest.mark.parametrize("number", range(FIRST, FIRST + CASES))
def test_a_random_run_is_that_of_one_chip_or_refused(number: int, one_thread: None) -> None:
    ended = ended_by_number(number)
    assert ended.outcome not in WRONG, f"{ended.case}\n{ended.what}"
