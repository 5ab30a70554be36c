"""Full fidelity at scale: every message of a ring, of halving-doubling, of random traffic; time, memory, rates.

The rows that other simulators are known by (ASTRA-sim 35.7 s and SimGrid 47.5 s for the ring without jitter,
SimGrid 7.0 s and ASTRA-sim 43.8 s with 5.6 GB for halving-doubling on 4,096). Each row runs in a process of its
own, on one core: `compile_s` is the first run on a small case with an empty cache, `load_s` the same with what
was compiled kept, `seconds` the median of the timed runs (schedule and routes included), `rss_mb` the peak.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
from support.harness import median, report

NBYTES = 64 * 2**20
HOP = (500e-9, 50e9)
REPEATS = 5
JITTER = 0.05


def ring(num_chips: int, method: str | None) -> dict[str, object]:
    """All-reduce of 64 MiB in 4 chunks around a ring of wires whose rates differ by up to 5 %."""
    from comms.algorithms import ring as algorithm
    from comms.algorithms.rounds import Ranks
    from comms.collectives.schedule import Op
    from comms.networks.fabrics.torus_mesh import Torus
    from comms.networks.links import Link
    from comms.networks.topology import Conditions
    from comms.simulation.compiled import CollectiveJob
    from comms.simulation.full import Method, simulate

    wires = Torus((num_chips,), (Link(*HOP),))
    speed = np.random.default_rng(0).uniform(1 - JITTER, 1 + JITTER, wires.wires().num_wires)
    jitter = Conditions(factors=dict(enumerate(speed.tolist())))
    start = time.perf_counter()
    job = CollectiveJob(
        algorithm.schedule(Op.ALL_REDUCE, Ranks(num_chips, pieces=4)), np.arange(num_chips), NBYTES
    )
    result = simulate(wires, [job], jitter, method=Method(method) if method else None)
    return _row(result, start)


def halving_doubling(num_chips: int, jitter: float) -> dict[str, object]:
    """All-reduce of 64 MiB on one switch."""
    from comms.algorithms import doubling
    from comms.algorithms.rounds import Ranks
    from comms.collectives.schedule import Op
    from comms.networks.links import Link
    from comms.networks.network import Network, TierKind, switched
    from comms.networks.topology import Conditions
    from comms.simulation.compiled import CollectiveJob
    from comms.simulation.full import simulate

    switch = Network(
        (switched("switch", num_chips, Link(2 * HOP[0], HOP[1]), TierKind.SCALE_OUT),)
    ).topology()
    speed = np.random.default_rng(0).uniform(1 - jitter, 1 + jitter, switch.wires().num_wires)
    conditions = Conditions(factors=dict(enumerate(speed.tolist())) if jitter else {})
    start = time.perf_counter()
    job = CollectiveJob(
        doubling.halving_schedule(Op.ALL_REDUCE, Ranks(num_chips)), np.arange(num_chips), NBYTES
    )
    return _row(simulate(switch, [job], conditions), start)


def permutation(num_chips: int, bursts: int) -> dict[str, object]:
    """Random permutations over a 4:1 oversubscribed leaf-spine: each chip sends `bursts` messages of random size."""
    from comms.collectives.schedule import Channel, Op, Pattern, Round, Schedule
    from comms.networks.fabrics.switch_tree import Tree
    from comms.networks.layers import Spread, Switch, Trunk
    from comms.networks.links import Link
    from comms.simulation.compiled import CollectiveJob
    from comms.simulation.full import simulate

    leaf = 32
    uplinks = Trunk(leaf, Link(*HOP), Switch("spine"), paths=leaf // 4)
    fabric = Tree(num_chips, Link(*HOP), Switch("leaf"), (uplinks,), spread=Spread.HASHED)
    random = np.random.default_rng(0)
    chips, one = np.arange(num_chips), np.ones(num_chips, dtype=np.int64)
    shares = random.lognormal(0.0, 1.0, num_chips * bursts) / num_chips
    channels = []
    for burst in range(bursts):
        order = random.permutation(num_chips)
        pattern = Pattern(order, np.roll(order, 1))
        channels.append(Channel(((Round(pattern, chips + burst * num_chips, one, reduces=False),),)))
    schedule = Schedule(Op.ALL_TO_ALL, "random", num_chips, num_chips * bursts, shares, tuple(channels))
    start = time.perf_counter()
    result = simulate(fabric, [CollectiveJob(schedule, chips, NBYTES)])
    return _row(result, start)


def _row(result: object, start: float) -> dict[str, object]:
    from comms.simulation.full import FullResult

    assert isinstance(result, FullResult)
    seconds = time.perf_counter() - start
    row: dict[str, object] = {
        "predicted_us": float(result.seconds[0]) * 1e6,
        "messages": result.num_messages,
        "method": str(result.method),
        "seconds": seconds,
        "messages_per_s": result.num_messages / seconds,
    }
    if result.flow_events:
        row |= {
            "flow_events_per_s": result.flow_events / seconds,
            "solved_per_event": result.flows_solved / result.flow_events,
        }
    return row


CASES = {
    "ring 1,024 chips, 4 chunks, jitter": (ring, (1024, None), (8, None)),
    "the same by events": (ring, (1024, "events"), (8, "events")),
    "halving-doubling 4,096 chips": (halving_doubling, (4096, 0.0), (8, 0.0)),
    "the same with jitter": (halving_doubling, (4096, JITTER), (8, JITTER)),
    "1,024 flows, permutation, 4:1": (permutation, (1024, 1), (64, 1)),
    "4,096 flows, 4 permutations, 4:1": (permutation, (1024, 4), (64, 4)),
}


def run_case(name: str, repeats: int) -> None:
    """In a process of its own: compile or load on a small case, then the timed runs; prints one JSON line."""
    case, large, small = CASES[name]
    start = time.perf_counter()
    case(*small)
    first_s = time.perf_counter() - start
    rows = [case(*large) for _ in range(repeats)]
    row = dict(rows[0]) | {
        key: median([r[key] for r in rows]) for key in rows[0] if key.endswith(("seconds", "_per_s"))
    }
    row |= {"first_s": first_s, "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}
    print(json.dumps(row))


def in_process(name: str, repeats: int) -> dict[str, object]:
    """The row of a case, from a fresh process on one core."""
    command = [sys.executable, __file__, "--case", name, "--repeats", str(repeats)]
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(["taskset", "-c", str(core), *command], capture_output=True, text=True, check=True)
    row: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return row


def empty_cache() -> None:
    """Forget what was compiled, so that the next process compiles."""
    from comms.simulation.jit import FOLDER

    if FOLDER:
        shutil.rmtree(FOLDER, ignore_errors=True)


def main() -> None:
    """Print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=list(CASES), help="one case, in this process")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="timed runs, the median counts")
    given = parser.parse_args()
    if given.case:
        run_case(given.case, given.repeats)
        return
    empty_cache()
    rows = []
    for name in CASES:
        cold = in_process(name, 1)["first_s"]
        row = in_process(name, given.repeats)
        rows.append({"case": name, **row, "load_s": row.pop("first_s"), "compile_s": cold})
    report("comms_scale", [{key: value for key, value in row.items() if key != "first_s"} for row in rows])


if __name__ == "__main__":
    main()
