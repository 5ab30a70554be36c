"""The roofline's two sides, its two lanes, and what counts as a kernel."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.chips import load_chip
from kernels.roofline import (
    VECTOR_EFFICIENCY,
    SegmentTime,
    device_seconds,
    is_matmul,
    is_view,
    memory_seconds,
    segment_time,
)

CHIP = load_chip("nvidia_a100_sxm_80gb")


@dataclass(frozen=True)
class Out:
    dtype: str


@dataclass(frozen=True)
class Row:
    target: str
    flops: int
    read_bytes: int
    write_bytes: int
    outs: tuple[Out, ...] = (Out("bf16"),)


SMALL = Row("aten.add.Tensor", 10, 40, 20)
VIEW = Row("aten.view.default", 0, 0, 0)
rows = st.builds(
    Row,
    st.sampled_from(["aten.mm.default", "aten.add.Tensor", "aten.bmm.default"]),
    st.integers(0, 10**13),
    st.integers(0, 10**10),
    st.integers(0, 10**10),
)


def matmul(n, dtype="bf16"):
    width = {"bf16": 2, "f32": 4}[dtype]
    return Row("aten.mm.default", 2 * n**3, 2 * n * n * width, n * n * width, (Out(dtype),))


def test_a_large_matmul_is_bound_by_the_matrix_pipes_of_its_dtype():
    for dtype, peak in (("bf16", "bf16"), ("f32", "fp32")):
        expected = 2 * 8192**3 / (CHIP.peak(peak) * CHIP.matmul_efficiency)
        assert device_seconds(matmul(8192, dtype), CHIP) == pytest.approx(expected)


def test_a_thin_matmul_and_an_addition_are_bound_by_memory():
    thin = Row("aten.mm.default", 2 * 4096 * 4096, 4096 * 4096 * 2, 4096 * 2)
    assert device_seconds(thin, CHIP) == memory_seconds(4096 * 4097 * 2, CHIP)
    assert device_seconds(SMALL, CHIP) == memory_seconds(60, CHIP)


def test_arithmetic_outside_matmuls_runs_at_the_vector_peak():
    heavy = Row("aten.exp.default", 10**12, 8, 8)
    assert device_seconds(heavy, CHIP) == pytest.approx(10**12 / (CHIP.peak("fp32") * VECTOR_EFFICIENCY))


def test_views_cost_nothing_and_launch_nothing():
    assert is_view(VIEW)
    assert segment_time([VIEW, VIEW], CHIP) == SegmentTime(0.0, 0.0)


def test_attention_and_products_are_matmuls_and_the_rest_is_not():
    names = (
        "aten.mm.default", "aten._scaled_dot_product_flash_attention_for_cpu.default", "aten._grouped_mm.default",
        "orchestrate.expert_mm.default", "orchestrate.expert_mm_weights.default",
    )  # fmt: skip
    assert all(is_matmul(Row(name, 1, 1, 1)) for name in names)
    assert not is_matmul(Row("aten.mul.Tensor", 1, 1, 1))


def test_many_small_kernels_are_bound_by_the_host_and_few_large_ones_by_the_device():
    small = segment_time([SMALL] * 100, CHIP)
    assert small.seconds == small.host_s == pytest.approx(100 * CHIP.launch_s)
    large = segment_time([matmul(8192)] * 3, CHIP)
    assert large.seconds == large.device_s


@given(st.lists(rows, max_size=8), st.floats(1, 10))
def test_a_faster_chip_is_never_slower(ops, k):
    peaks = {dtype: peak * k for dtype, peak in CHIP.peak_flops_per_s.items()}
    faster = replace(CHIP, peak_flops_per_s=peaks, memory_bytes_per_s=CHIP.memory_bytes_per_s * k)
    assert segment_time(ops, faster).seconds <= segment_time(ops, CHIP).seconds * (1 + 1e-12)


@given(st.lists(rows, max_size=8), st.floats(1, 10))
def test_a_chip_k_times_slower_in_everything_takes_k_times_as_long(ops, k):
    slower = replace(
        CHIP,
        peak_flops_per_s={dtype: peak / k for dtype, peak in CHIP.peak_flops_per_s.items()},
        memory_bytes_per_s=CHIP.memory_bytes_per_s / k,
        launch_s=CHIP.launch_s * k,
    )
    assert segment_time(ops, slower).seconds == pytest.approx(k * segment_time(ops, CHIP).seconds)
