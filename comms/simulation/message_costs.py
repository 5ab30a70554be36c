"""Costs of a message that both ways of full fidelity reckon alike: noise, and switches that store. Compiled."""

import numpy as np
from numpy.typing import NDArray

from comms.simulation.jit import compiled_inside


@compiled_inside
def uniform(seed: int, message: int, piece: int, started_s: float) -> float:
    """In (0, 1], from a hash of the message and its run's start (splitmix64): no state, no order to depend on."""
    x = np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(message) * np.uint64(
        0xD1B54A32D192ED03
    )
    x += np.uint64(piece) * np.uint64(0x8CB92BA72F3D8DD7)
    x += np.uint64(np.int64(started_s * 1e12)) * np.uint64(0xAEF17502108EF2D9)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (np.float64(x >> np.uint64(11)) + 1.0) / 9007199254740992.0


@compiled_inside
def forwarding_s(
    forward_nbytes: NDArray[np.float64],
    route: NDArray[np.int32],
    resources: NDArray[np.void],
    start: int,
    end: int,
    nbytes: float,
) -> float:
    """What switches add that take a packet, or the whole message, in before they send on."""
    total = 0.0
    if len(forward_nbytes) > 0:
        for hop in range(start, end - 1):
            held = min(forward_nbytes[route[hop]], nbytes)
            if held > 0.0:
                total += held / resources[route[hop]].bytes_per_s
    return total
