"""Our account of ASTRA-sim's and SimGrid's choices beside what their released code answered, and the time each takes.

`peer_s` is one run of the peer as a process on one core of the machine where it was measured, which may be another
one. SimGrid's answers have six decimals of a second.

    python benchmarks/peer_parity.py
"""

from collections.abc import Callable, Iterator

from support.harness import median, report, seconds_of
from support.peers import (
    AstraAxis,
    AstraShape,
    AstraSystem,
    PeerAlgorithm,
    astra_collective_ns,
    astra_step_ns,
    simgrid_all_reduce_seconds,
)

from comms.collectives.schedule import Op

ROUNDS = 5
NBYTES = 64 * 2**20
EXAMPLE_NBYTES = 2**20
RING, HALVING = PeerAlgorithm.RING, PeerAlgorithm.HALVING_DOUBLING
UNAWARE, AWARE = AstraSystem(), AstraSystem(congestion_aware=True)
HGX = AstraSystem(congestion_aware=True, local_memory_gb_per_s=3350.0, active_chunks=2)
HGX_AXES = (AstraAxis(AstraShape.SWITCH, 8, 400.0, 936.25),)

# ASTRA-sim 518bd51, analytical back ends 599a047: shape, algorithm, system, chips, ns answered, wall seconds taken.
FLAT = (
    (AstraShape.RING, RING, UNAWARE, 16, 2_522_860, 0.02),
    (AstraShape.RING, RING, UNAWARE, 64, 2_840_836, 0.09),
    (AstraShape.RING, RING, UNAWARE, 256, 3_651_640, 1.50),
    (AstraShape.RING, RING, UNAWARE, 1024, 6_792_760, 35.7),
    (AstraShape.RING, RING, AWARE, 64, 2_840_836, 0.13),
    (AstraShape.RING, RING, AWARE, 256, 3_651_640, 2.19),
    (AstraShape.SWITCH, RING, AWARE, 64, 5_553_364, 0.15),
    (AstraShape.SWITCH, RING, AWARE, 256, 7_160_440, 2.37),
    (AstraShape.SWITCH, RING, AWARE, 1024, 13_380_880, 53.8),
    (AstraShape.SWITCH, HALVING, AWARE, 64, 5_031_272, 0.04),
    (AstraShape.SWITCH, HALVING, AWARE, 1024, 5_138_620, 3.26),
)
# chips, ns of one all-reduce and seconds taken, ns of the 32-layer step and seconds taken
TWO_LEVELS = ((64, 478_014, 0.05, 246_711_316, 2.6), (1024, 644_754, 1.91, 251_142_048, 104.3))
EXAMPLES = (
    ("HGX-H100-validated", Op.ALL_REDUCE, HGX_AXES, HGX, 57_426),
    ("HGX-H100-validated", Op.ALL_GATHER, HGX_AXES, HGX, 44_058),
    ("HGX-H100-validated", Op.REDUCE_SCATTER, HGX_AXES, HGX, 28_950),
    ("HGX-H100-validated", Op.ALL_TO_ALL, HGX_AXES, HGX, 114_000),
    ("Ring_16npus", Op.ALL_GATHER, (AstraAxis(AstraShape.RING, 16, 50.0, 500.0),), AWARE, 323_560),
    ("Ring_4npus", Op.REDUCE_SCATTER, (AstraAxis(AstraShape.RING, 4, 50.0, 500.0),), UNAWARE, 22_240),
)
# SimGrid 3.32, as it prints them: algorithm, hosts, seconds answered, wall seconds taken.
STAR = (
    (RING, 64, 0.006139, 0.17),
    (RING, 256, 0.016165, 4.22),
    (RING, 1024, 0.056140, 47.5),
    (HALVING, 64, 0.003173, 0.10),
    (HALVING, 1024, 0.003423, 1.41),
)


def main() -> None:
    """Compare and report."""
    report("peer_parity", [*astra_rows(), *simgrid_rows()])


def astra_rows() -> Iterator[dict[str, object]]:
    """ASTRA-sim: one axis, two axes, a training step on two axes, its shipped examples."""
    for shape, algorithm, system, chips, peer_ns, peer_s in FLAT:
        case = f"all_reduce 64 MiB, {shape}{' aware' if system.congestion_aware else ''}, {algorithm}"
        axes = (AstraAxis(shape, chips, 50.0, 500.0, algorithm),)
        yield row(
            "ASTRA-sim", case, chips, peer_ns / 1e9, peer_s,
            lambda axes=axes, system=system: astra_collective_ns(Op.ALL_REDUCE, NBYTES, axes, system) / 1e9,
        )  # fmt: skip
    for chips, peer_ns, peer_s, step_ns, step_s in TWO_LEVELS:
        axes = (
            AstraAxis(AstraShape.SWITCH, 8, 450.0, 500.0, RING),
            AstraAxis(AstraShape.SWITCH, chips // 8, 50.0, 2000.0, HALVING),
        )
        yield row(
            "ASTRA-sim", "all_reduce 64 MiB, 2 levels", chips, peer_ns / 1e9, peer_s,
            lambda axes=axes: astra_collective_ns(Op.ALL_REDUCE, NBYTES, axes) / 1e9,
        )  # fmt: skip
        yield row(
            "ASTRA-sim", "32-layer step, 2 levels", chips, step_ns / 1e9, step_s,
            lambda axes=axes: astra_step_ns(axes) / 1e9,
        )  # fmt: skip
    for name, op, axes, system, peer_ns in EXAMPLES:
        yield row(
            "ASTRA-sim", f"{op} 1 MiB, {name}", axes[0].chips, peer_ns / 1e9, None,
            lambda op=op, axes=axes, system=system: astra_collective_ns(op, EXAMPLE_NBYTES, axes, system) / 1e9,
        )  # fmt: skip


def simgrid_rows() -> Iterator[dict[str, object]]:
    """SimGrid: a star of 50 GB/s and 1 us a link."""
    for algorithm, chips, answered_s, peer_s in STAR:
        yield row(
            "SimGrid", f"all_reduce 64 MiB, star, {algorithm}", chips, answered_s, peer_s,
            lambda algorithm=algorithm, chips=chips: simgrid_all_reduce_seconds(NBYTES, chips, algorithm),
        )  # fmt: skip


def row(
    peer: str, case: str, chips: int, answered_s: float, peer_s: float | None, ours: Callable[[], float]
) -> dict[str, object]:
    """One comparison; `error_pct` is of our answer against the peer's."""
    found = ours()
    return {
        "peer": peer,
        "case": case,
        "chips": chips,
        "answered_ns": round(answered_s * 1e9),
        "ours_ns": round(found * 1e9),
        "error_pct": round(abs(found / answered_s - 1) * 100, 4),
        "ours_s": median([seconds_of(ours) for _ in range(ROUNDS)]),
    } | ({} if peer_s is None else {"peer_s": peer_s})


if __name__ == "__main__":
    main()
