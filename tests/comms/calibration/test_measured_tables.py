"""Measured tables: every dialect of nccl-tests and CSV gives the same points, and mistakes say their line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comms.calibration.measured_tables import (
    MeasuredCurve,
    MeasuredPoint,
    bus_factor,
    read_csv,
    read_table,
)
from comms.collectives.schedule import Op
from comms.errors import CommsError, UnitError

RANKS = "\n".join(
    f"#  Rank {rank:2d} Group  0 Pid {4000 + rank:6d} on     host-a device {rank:2d} [0000:{rank:02x}:00] Some Chip"
    for rank in range(8)
)
THREADS = (
    "# nThread 1 nGpus 8 minBytes 1024 maxBytes 4096 step: 2(factor) warmup iters: 1 iters: 20 agg iters: 1"
)
HEADER = """#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)             (us)  (GB/s)  (GB/s)
"""
ROWS = """\
        1024           256     float     sum      -1    20.40    0.05    0.09       0    20.00    0.05    0.09       0
     1048576        262144     float     sum      -1    52.00   20.16   35.29       0    50.00   20.97   36.70       0
"""
EMPTY = "           0             0     float     sum      -1     9.00 0.00 0.00 0     9.00 0.00 0.00 0\n"
MODERN = (
    f"# Collective test starting: all_reduce_perf\n{THREADS}\n#\n# Using devices\n{RANKS}\n{HEADER}{ROWS}"
)
FOOTER = "# Out of bounds values : 0 OK\n# Avg bus bandwidth    : 18.4\n#\n# Collective test concluded\n"


def times(curve: MeasuredCurve) -> list[tuple[float, float]]:
    return [(point.nbytes, round(point.seconds * 1e6, 6)) for point in curve.points]


def test_the_text_says_operation_and_chips_and_results_written_over_the_input_count():
    inside = read_table(MODERN + FOOTER)
    assert (inside.op, inside.num_chips) == (Op.ALL_REDUCE, 8)
    assert times(inside) == [(1024, 20.0), (1048576, 50.0)]


@pytest.mark.parametrize(
    "text",
    [
        MODERN.replace("\n     1048576", "\nhost-a:4000:4100 [0] NCCL INFO Channel 00/24 : 0 1 2\n     1048576"),
        "\n".join(f"[1,0]<stdout>:{line}" for line in MODERN.splitlines()),
        "\n".join(f"0: {line}" for line in MODERN.splitlines()),
        MODERN.replace("       0\n", "     N/A\n"),
        MODERN.replace(ROWS, EMPTY + ROWS),
        MODERN.replace(RANKS, ""),
        MODERN.replace("root     time", "root  cputime"),
    ],
    ids=["debug lines", "mpirun tags", "srun labels", "unchecked", "empty size", "threads only", "cpu time"],
)  # fmt: skip
def test_what_stands_around_the_rows_does_not_matter(text):
    assert read_table(text) == read_table(MODERN)


def test_columns_are_found_by_the_header_whatever_the_version():
    old = """# nThread 1 nGpus 2 minBytes 1024 maxBytes 2048 step: 2(factor) warmup iters: 5 iters: 20 validation: 1
#       size         count    type   redop     time   algbw   busbw  error     time   algbw   busbw  error
     2097152        524288   float     sum    70.44   29.77   29.77  4e-07    69.77   30.06   30.06  4e-07
"""
    iterations = """# Collective test starting: all_reduce_perf_mpi
# nThread 1 nGpus 2 minBytes 1024 maxBytes 2048 step: 2(factor)
#       size         count      type   redop    root     time   algbw   busbw  #wrong    i_min    i_max    i_p99   \
i_cv%     time   algbw   busbw  #wrong    i_min    i_max    i_p99    i_cv% timestamp
     2097152        524288     float     sum      -1    70.44   29.77   29.77       0    60.00    80.00    80.00    \
 5.00    69.77   30.06   30.06       0    60.00    80.00    80.00     5.00   2026-01-01 00:00:00
"""
    replay = """# Collective test starting: all_reduce_perf
# nThread 1 nGpus 2 minBytes 1024 maxBytes 2048 step: 2(factor)
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong
     2097152        524288     float     sum      -1                                     69.77   30.06   30.06       0
"""
    expected = [(2097152, 69.77)]
    assert times(read_table(old, op=Op.ALL_REDUCE)) == expected
    assert times(read_table(iterations)) == expected
    assert times(read_table(replay)) == expected


def test_an_old_all_gather_counts_the_factor_in_its_payload_bandwidth_and_is_read_right():
    text = """# nThread 1 nGpus 2
#       size         count    type     time   algbw   busbw  error     time   algbw   busbw  error
     1048576        131072   float    47.38   11.06   11.06  0e+00    46.84   11.19   11.19  0e+00
"""
    assert times(read_table(text, op=Op.ALL_GATHER)) == [(1048576, 46.84)]
    with pytest.raises(CommsError, match="does not follow"):
        read_table(text, op=Op.ALL_REDUCE)


def test_bare_rows_need_to_be_told_what_they_are():
    curve = read_table(ROWS, op=Op.ALL_REDUCE, num_chips=8)
    assert times(curve) == times(read_table(MODERN))
    with pytest.raises(CommsError, match="over how many chips"):
        read_table(ROWS, op=Op.ALL_REDUCE)
    with pytest.raises(CommsError, match="which operation"):
        read_table(ROWS, num_chips=8)


def test_messages_between_two_chips_have_no_operation():
    text = """# Collective test starting: sendrecv_perf
# nThread 1 nGpus 2
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong
     1048576        262144     float    none      -1    50.00   20.97   20.97       0    50.00   20.97   20.97     N/A
"""
    assert read_table(text).op is None


@pytest.mark.parametrize(
    ("text", "message", "where"),
    [
        (MODERN.replace("20.97   36.70       0", "host-a:1:2 [0] NCCL INFO"), "cut short", "line 18"),
        (MODERN.replace("20.97   36.70       0", ""), "cut short", "line 18"),
        (MODERN.replace("36.70       0", "36.70       7"), "7 results were wrong", "line 18"),
        (MODERN.replace("    50.00", "     0.00"), "above zero", "line 18"),
        (MODERN.replace("Rank  3", "Rank  2"), "same rank appears twice", "run.txt"),
        (MODERN + MODERN.replace(RANKS, ""), "1024 bytes appears twice", "run.txt"),
        (MODERN + "./all_gather_perf -b 8", "all_gather and all_reduce", "run.txt"),
        (MODERN.replace(ROWS, ""), "header needs|no rows", "run.txt"),
        (MODERN.replace(RANKS, "").replace("nGpus 8", "nGpus 4"), "does not follow", "run.txt"),
        (MODERN.replace(RANKS, "").replace("nGpus 8", "nGpus 1"), "1 chip", "run.txt"),
    ],
)
def test_a_mistake_in_the_text_is_named_with_its_place(text, message, where):
    with pytest.raises(CommsError, match=message) as error:
        read_table(text, "run.txt")
    assert where in error.value.where
    assert error.value.hint


def test_what_is_said_must_agree_with_the_text():
    with pytest.raises(CommsError, match="not of broadcast"):
        read_table(MODERN, op=Op.BROADCAST)
    with pytest.raises(CommsError, match="is of 8 chips, not of 4"):
        read_table(MODERN, num_chips=4)
    assert read_table(MODERN, op=Op.ALL_REDUCE, num_chips=8) == read_table(MODERN)


@pytest.mark.parametrize(
    "text",
    [
        "size,time_us\n1048576,50\n",
        "bytes,seconds\n1048576,50e-6\n",
        "nbytes;time (ms)\n1048576;0.05\n",
        "size\ttime_us\n1 MiB\t50\n",
        "size_MiB,latency_us,count\n1,50,9\n",
        "message_bytes,algbw_GB_s\n1048576,20.97152\n",
        "message_bytes,algbw_Gbps\n1048576,167.77216\n",
        "# taken by hand\n\nsize,busbw (GB/s)\n1048576,36.70016\n",
        "size,busbw_bytes_per_s\n1048576,36700160000\n",
        "op,num_chips,size,time\nall_reduce,8,1 MiB,50 us\n",
    ],
)
def test_csv_may_be_written_in_many_ways(text):
    given = {} if text.startswith("op") else {"op": Op.ALL_REDUCE, "num_chips": 8}
    curve = read_table(text, **given)
    assert (curve.op, curve.num_chips) == (Op.ALL_REDUCE, 8)
    assert [(p.nbytes, pytest.approx(p.seconds)) for p in curve.points] == [(1048576, 50e-6)]


@pytest.mark.parametrize(
    ("text", "message", "where"),
    [
        ("size,speed\n1,2\n", "size and a time or bandwidth", "t.csv, line 1"),
        ("size,time\n1,2\n", "needs a unit", "t.csv, line 2"),
        ("# a\nsize,time_us\n1,2\n3\n", "1 cells, the header has 2", "t.csv, line 4"),
        ("size,time_us\n1,soon\n", "'soon' is not a number", "t.csv, line 2"),
        ("size,time_us\n1,-3\n", "not negative", "t.csv, line 2"),
        ("size,time_us\n0,3\n", "above zero", "t.csv, line 2"),
        ("size,busbw_GB_s\n8,0.00\n", "above zero", "t.csv, line 2"),
        ("size,time_us\n8,3\n8,4\n", "8 bytes appears twice", "t.csv"),
        ("size,time_furlongs\n8,3\n", "unknown unit", "t.csv, line 2"),
        ("size,time_us,op\n8,3,all_gather\n16,3,reduce\n", "op changes", "t.csv, line 3"),
        ("size,time_us,op\n8,3,all_sing\n", "unknown operation 'all_sing'", "t.csv"),
        ("size,time_us,chips\n8,3,many\n", "'many' is not a number of chips", "t.csv"),
        ("size,time_us\n", "no rows", "t.csv"),
        ("", "no rows", "t.csv"),
    ],
)
def test_a_mistake_in_csv_is_named_with_its_place(text, message, where):
    with pytest.raises((CommsError, UnitError), match=message) as error:
        read_csv(text, "t.csv")
    assert error.value.where == where
    assert error.value.hint


def test_csv_of_a_collective_needs_the_number_of_chips():
    with pytest.raises(CommsError, match="over how many chips"):
        read_csv("size,time_us\n8,3\n", op=Op.BROADCAST)
    assert read_csv("size,time_us\n8,3\n") == MeasuredCurve(None, 2, (MeasuredPoint(8, 3e-6, 0.5 / 3),))


@given(st.floats(1.0, 9e5), st.integers(10, 33), st.sampled_from([2, 4, 8, 16, 64]))
def test_a_printed_time_is_within_its_rounding(microseconds, log_size, chips):
    bus = 2.0**log_size / microseconds / 1e3 * bus_factor(Op.ALL_REDUCE, chips)
    row = f"{2**log_size} 1 float sum -1 {microseconds:.2f} 0.00 {bus:.2f} 0 "
    text = row + f"{microseconds:.2f} 0.00 {bus:.2f} 0"
    (point,) = read_table(text, op=Op.ALL_REDUCE, num_chips=chips).points
    assert abs(point.seconds * 1e6 / microseconds - 1) <= point.rounding * 1.02 + 1e-12


def test_few_digits_leave_a_point_open():
    fine, coarse = read_csv("size,algbw_GB_s\n1024,0.04\n1048576,36.22\n").points
    assert (fine.rounding, coarse.rounding) == (pytest.approx(0.125), pytest.approx(0.005 / 36.22))


@pytest.mark.parametrize(
    ("op", "factor"),
    [(Op.ALL_REDUCE, 1.75), (Op.ALL_GATHER, 0.875), (Op.REDUCE_SCATTER, 0.875), (Op.ALL_TO_ALL, 0.875),
     (Op.BROADCAST, 1.0), (Op.REDUCE, 1.0), (None, 1.0)],
)  # fmt: skip
def test_bus_bandwidth_is_that_of_nccl_tests(op, factor):
    assert bus_factor(op, 8) == factor
