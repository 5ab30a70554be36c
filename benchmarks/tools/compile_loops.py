"""Compile every loop of full fidelity and of synthesis now, so that nobody waits for it later.

For images and for the tests: `python benchmarks/tools/compile_loops.py`. One process compiles at a time, others wait
for it and load what it has kept. (Without a lock each would compile the same.)
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from comms.algorithms import ring
from comms.algorithms.rounds import Ranks
from comms.collectives.schedule import Op
from comms.networks.fabrics.torus_mesh import Torus
from comms.networks.links import Link
from comms.simulation.compiled import CollectiveJob
from comms.simulation.full import Method, simulate
from comms.simulation.incremental import IncrementalSimulation
from comms.simulation.jit import FOLDER
from comms.synthesis.synthesis import synthesize


def compile_loops() -> None:
    """Calls each entry point once, on four chips."""
    square = Torus((2, 2), (Link(1e-6, 1e9),))
    job = CollectiveJob(ring.schedule(Op.ALL_REDUCE, Ranks(4)), np.arange(4), 1e6)
    with one_at_a_time():
        for method in Method:
            simulate(square, [job], method=method)
        again = IncrementalSimulation(square, [job])
        for _ in range(2):
            again.start(0, 0, 0.0)
            again.advance(np.inf)
        synthesize(Op.ALL_REDUCE, square, 1e6, seed=0)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Nothing to wait for where nothing can be kept."""
    if not FOLDER:
        yield
        return
    with (Path(FOLDER) / "compiling.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    compile_loops()
