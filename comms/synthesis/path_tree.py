"""Growth: one tree over chips, hop by hop. Compiled."""

import numpy as np
from numpy.typing import NDArray

from comms.simulation.jit import compiled

NONE = -1


@compiled
def grown(costs: NDArray[np.float64], root: int, lean: float) -> NDArray[np.int64]:
    """[chips] The parent of each chip in one tree over hops of finite costs[parent, chip]; NONE at the root.

    The next chip is the one with the smallest cost of its hop plus `lean` times what its parent has so far.
    """
    # Prim's and Dijkstra's algorithms over a full table, without a heap: n^2 steps, as many as there are costs to read.
    n = len(costs)
    parent = np.full(n, NONE)
    is_open = np.ones(n, dtype=np.bool_)
    key = np.full(n, np.inf)
    chip, so_far = root, 0.0
    for _ in range(n - 1):
        is_open[chip] = False
        following, least = NONE, np.inf
        for other in range(n):
            if not is_open[other]:
                continue
            offer = costs[chip, other] + lean * so_far
            if offer < key[other]:
                key[other], parent[other] = offer, chip
            if key[other] < least:
                following, least = other, key[other]
        chip, so_far = following, least
    return parent
