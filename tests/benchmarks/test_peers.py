"""Peers: ASTRA-sim's and SimGrid's own answers, measured with their released code, and the rules they follow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.peers import (
    AstraAxis,
    AstraNode,
    AstraShape,
    AstraStep,
    AstraSystem,
    PeerAlgorithm,
    SimGridStar,
    astra_collective_ns,
    astra_step_ns,
    astra_trace_ns,
    simgrid_all_reduce_seconds,
)

from comms.collectives.schedule import Op
from comms.errors import CommsError

MIB = 2**20
RING, HALVING = PeerAlgorithm.RING, PeerAlgorithm.HALVING_DOUBLING
UNAWARE, AWARE = AstraSystem(), AstraSystem(congestion_aware=True)
HGX = AstraSystem(congestion_aware=True, local_memory_gb_per_s=3350.0, active_chunks=2)
HGX_AXES = (AstraAxis(AstraShape.SWITCH, 8, 400.0, 936.25),)


def flat(shape, chips, algorithm=RING):
    return (AstraAxis(shape, chips, 50.0, 500.0, algorithm),)


def two_levels(chips):
    return (
        AstraAxis(AstraShape.SWITCH, 8, 450.0, 500.0, RING),
        AstraAxis(AstraShape.SWITCH, chips // 8, 50.0, 2000.0, HALVING),
    )


# ASTRA-sim 518bd51 with analytical back ends 599a047: every row to the nanosecond.
@pytest.mark.parametrize(
    ("shape", "algorithm", "system", "chips", "measured_ns"),
    [
        (AstraShape.RING, RING, UNAWARE, 16, 2_522_860),
        (AstraShape.RING, RING, UNAWARE, 64, 2_840_836),
        (AstraShape.RING, RING, UNAWARE, 256, 3_651_640),
        (AstraShape.RING, RING, UNAWARE, 1024, 6_792_760),
        (AstraShape.RING, RING, AWARE, 64, 2_840_836),
        (AstraShape.RING, RING, AWARE, 256, 3_651_640),
        (AstraShape.SWITCH, RING, AWARE, 64, 5_553_364),
        (AstraShape.SWITCH, RING, AWARE, 256, 7_160_440),
        (AstraShape.SWITCH, RING, AWARE, 1024, 13_380_880),
        (AstraShape.SWITCH, HALVING, AWARE, 64, 5_031_272),
        (AstraShape.SWITCH, HALVING, AWARE, 1024, 5_138_620),
    ],
)
def test_astra_on_one_axis(shape, algorithm, system, chips, measured_ns):
    found = astra_collective_ns(Op.ALL_REDUCE, 64 * MIB, flat(shape, chips, algorithm), system)
    assert found == measured_ns


@pytest.mark.parametrize(("chips", "measured_ns"), [(64, 478_014), (1024, 644_754)])
def test_astra_on_two_axes(chips, measured_ns):
    assert astra_collective_ns(Op.ALL_REDUCE, 64 * MIB, two_levels(chips)) == measured_ns


@pytest.mark.parametrize(
    ("op", "axes", "system", "measured_ns"),
    [
        (Op.ALL_REDUCE, HGX_AXES, HGX, 57_426),
        (Op.ALL_GATHER, HGX_AXES, HGX, 44_058),
        (Op.REDUCE_SCATTER, HGX_AXES, HGX, 28_950),
        (Op.ALL_TO_ALL, HGX_AXES, HGX, 114_000),
        (Op.ALL_GATHER, flat(AstraShape.RING, 16), AWARE, 323_560),
        (Op.REDUCE_SCATTER, flat(AstraShape.RING, 4), UNAWARE, 22_240),
    ],
)
def test_astras_shipped_examples_of_one_mebibyte(op, axes, system, measured_ns):
    assert astra_collective_ns(op, MIB, axes, system) == measured_ns


@pytest.mark.parametrize(("chips", "measured_ns"), [(64, 246_711_316), (1024, 251_142_048)])
def test_astras_training_step(chips, measured_ns):
    assert astra_step_ns(two_levels(chips)) == measured_ns


@pytest.mark.parametrize(
    ("algorithm", "chips", "measured_s"),
    [
        (RING, 64, 0.006139),
        (RING, 256, 0.016165),
        (RING, 1024, 0.056140),
        (HALVING, 64, 0.003173),
        (HALVING, 1024, 0.003423),
    ],
)
def test_simgrid_to_every_printed_digit(algorithm, chips, measured_s):
    found = simgrid_all_reduce_seconds(64 * MIB, chips, algorithm)
    assert round(found, 6) == measured_s
    assert found == pytest.approx(measured_s, rel=1e-3)


def test_a_small_ring_by_hand():
    # 0.5 B/ns; a chunk of 1608 bytes goes in parts of 402: 100.5 + 804.x on the wire, 3 x 100 for local memory.
    axis = AstraAxis(AstraShape.RING, 4, 0.5 * 1e9 / 2**30, 100.2)
    system = AstraSystem(local_memory_gb_per_s=4.0)
    reducing, keeping = 904 + 10 + 300, 904 + 10
    chunk_ns = 10 + 3 * reducing + 3 * keeping
    assert astra_collective_ns(Op.ALL_REDUCE, 4 * 1608, (axis,), system) == 4 * chunk_ns


def test_a_second_active_chunk_waits_for_the_link_only():
    # 1 B/ns, 400 bytes a message: two chunks leave 400 ns apart, the next two when they are done.
    axis = AstraAxis(AstraShape.SWITCH, 2, 1e9 / 2**30, 1000.2)
    system = AstraSystem(congestion_aware=True, active_chunks=2)
    one_ns = 10 + 2 * 1400 + 10
    assert astra_collective_ns(Op.ALL_GATHER, 4 * 400, (axis,), system) == 2 * one_ns + 400


@given(
    chips=st.integers(2, 40),
    chunk=st.integers(40, 10**6),
    gb_per_s=st.floats(1, 900),
    op=st.sampled_from([Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_TO_ALL]),
)
def test_on_a_ring_both_back_ends_agree(chips, chunk, gb_per_s, op):
    axes = (AstraAxis(AstraShape.RING, chips, gb_per_s, 500.5),)
    assert astra_collective_ns(op, 4 * chunk, axes, AWARE) == astra_collective_ns(
        op, 4 * chunk, axes, UNAWARE
    )


@given(
    inner=st.sampled_from([2, 4, 8]),
    outer=st.sampled_from([2, 4, 8, 16]),
    chunks=st.tuples(st.integers(128, 10**6), st.integers(128, 10**6)),
    algorithms=st.tuples(st.sampled_from(PeerAlgorithm), st.sampled_from(PeerAlgorithm)),
)
def test_more_bytes_never_take_less(inner, outer, chunks, algorithms):
    axes = (
        AstraAxis(AstraShape.SWITCH, inner, 450.0, 500.0, algorithms[0]),
        AstraAxis(AstraShape.RING, outer, 50.0, 2000.0, algorithms[1]),
    )
    few, many = (astra_collective_ns(Op.ALL_REDUCE, 4 * chunk, axes) for chunk in sorted(chunks))
    assert few <= many
    few_s, many_s = (simgrid_all_reduce_seconds(chunk, outer, algorithms[1]) for chunk in sorted(chunks))
    assert few_s <= many_s


def test_a_fast_second_axis_is_hidden_and_a_slow_one_alone_counts():
    slow, fast = (AstraAxis(AstraShape.SWITCH, 8, rate, 500.0) for rate in (10.0, 1000.0))
    size = 64 * MIB

    def inner_ns(op, nbytes, axis):
        return astra_collective_ns(op, nbytes, (axis, fast), involved=(0,))

    halves = inner_ns(Op.REDUCE_SCATTER, size, slow) + inner_ns(Op.ALL_GATHER, size // 8, slow)
    assert astra_collective_ns(Op.ALL_REDUCE, size, (slow, fast)) == halves
    first, last = (inner_ns(Op.REDUCE_SCATTER, size, fast), inner_ns(Op.ALL_GATHER, size // 8, fast))
    turn = astra_collective_ns(Op.ALL_REDUCE, size // 8, (fast, slow), involved=(1,))
    assert astra_collective_ns(Op.ALL_REDUCE, size, (fast, slow)) == first // 4 + turn + last // 4


def test_baseline_reduces_everything_on_every_axis():
    axes = two_levels(64)
    whole = astra_collective_ns(Op.ALL_REDUCE, MIB, axes, AstraSystem(local_bw_aware=False, dataset_splits=1))
    alone = [
        astra_collective_ns(Op.ALL_REDUCE, MIB, axes, AstraSystem(dataset_splits=1), (axis,))
        for axis in (0, 1)
    ]
    assert whole == sum(alone)


def test_equal_axes_have_queues_of_their_own():
    axes = [AstraAxis(AstraShape.SWITCH, 4, 50.0, 500.0)] * 2
    apart = [axes[0], AstraAxis(AstraShape.SWITCH, 4, 50.0, 500.0)]
    assert astra_collective_ns(Op.ALL_TO_ALL, MIB, axes) == astra_collective_ns(Op.ALL_TO_ALL, MIB, apart)
    one, both = (astra_collective_ns(Op.ALL_TO_ALL, MIB, axes, involved=used) for used in ((0,), (0, 1)))
    assert both == one * 5 // 4  # the second axis follows one chunk behind


def test_a_remainder_is_one_more_chunk_of_full_size():
    axes = flat(AstraShape.RING, 4)
    four, five = (astra_collective_ns(Op.ALL_REDUCE, nbytes, axes) for nbytes in (4 * MIB, 4 * MIB + 1))
    assert five == four * 5 // 4


def test_a_chunk_has_at_least_a_byte_for_every_chip():
    axes = flat(AstraShape.RING, 64)
    assert astra_collective_ns(Op.ALL_REDUCE, 1, axes) == astra_collective_ns(Op.ALL_REDUCE, 256, axes)


def test_a_trace_runs_one_collective_at_a_time_beside_one_computation():
    nodes = (
        AstraNode(100, False),
        AstraNode(250, True, (0,)),  # holds the lane until 350
        AstraNode(100, False, (0,)),
        AstraNode(50, True, (2,)),  # ready at 200, starts at 350
        AstraNode(10, False, (1, 3)),
    )
    assert astra_trace_ns(nodes) == 410


def test_ready_nodes_start_in_the_order_of_their_ids():
    first = (AstraNode(10, True), AstraNode(30, True), AstraNode(100, False, (0,)))
    last = (AstraNode(30, True), AstraNode(10, True), AstraNode(100, False, (1,)))
    assert (astra_trace_ns(first), astra_trace_ns(last)) == (110, 140)


def test_the_last_layers_gradients_are_all_that_a_short_all_reduce_exposes():
    axes = two_levels(64)
    step = AstraStep(layers=3, gradient_nbytes=MIB)
    tp = astra_collective_ns(Op.ALL_REDUCE, step.activation_nbytes, axes, involved=(0,))
    dp = astra_collective_ns(Op.ALL_REDUCE, step.gradient_nbytes, axes, involved=(1,))
    compute = 6 * (step.forward_ns + step.backward_ns) + step.optimizer_ns
    assert astra_step_ns(axes, step) == compute + 12 * tp + dp


def test_a_long_route_of_simgrid_is_bound_by_the_tcp_window():
    far = SimGridStar(link_latency_s=1.0)
    assert far.flow_bytes_per_s == pytest.approx(0.97 * 4_194_304 / 4)
    assert simgrid_all_reduce_seconds(1, 1, RING) == 0


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: AstraAxis(AstraShape.RING, 0, 50.0, 500.0), "at least one chip"),
        (lambda: AstraAxis(AstraShape.RING, 4, 0.0, 500.0), "must be positive"),
        (lambda: flat(AstraShape.SWITCH, 12, HALVING), "pairs chips"),
        (lambda: AstraSystem(dataset_splits=0), "must be positive"),
        (lambda: AstraSystem(endpoint_delay_ns=-1), "at least zero"),
        (lambda: AstraSystem(local_memory_gb_per_s=0.0), "must be positive"),
        (lambda: SimGridStar(bytes_per_s=0.0), "must be positive"),
        (lambda: astra_collective_ns(Op.BROADCAST, MIB, HGX_AXES), "no such collective"),
        (lambda: astra_collective_ns(Op.ALL_REDUCE, MIB, flat(AstraShape.RING, 1)), "more than one chip"),
        (lambda: astra_collective_ns(Op.ALL_REDUCE, 0, HGX_AXES), "too few bytes"),
        (lambda: astra_collective_ns(Op.ALL_GATHER, 3, HGX_AXES), "too few bytes"),
        (lambda: astra_collective_ns(Op.ALL_TO_ALL, MIB, two_levels(64)), "no all-to-all"),
        (lambda: astra_collective_ns(Op.ALL_REDUCE, MIB, two_levels(64), AWARE), "takes one axis"),
        (
            lambda: astra_collective_ns(Op.ALL_REDUCE, MIB, flat(AstraShape.RING, 8, HALVING), AWARE),
            "a Switch for halving",
        ),
        (lambda: astra_step_ns(HGX_AXES), "two axes"),
        (lambda: simgrid_all_reduce_seconds(0, 4, RING), "one byte"),
        (lambda: simgrid_all_reduce_seconds(1, 6, HALVING), "pairs hosts"),
    ],
)
def test_what_a_peer_cannot_answer_is_refused(make, problem):
    with pytest.raises(CommsError, match=problem):
        make()
