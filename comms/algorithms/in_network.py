"""In-network: switches add what comes up and copy what goes down (NVLS on NVSwitch, SHARP on InfiniBand).

Chips send what they have to the switch over them, which sends the sum to all of them, each by its own wire: a
buffer crosses every wire once each way, whatever the number of chips, so that an all_reduce can beat the bandwidth
bound of chips that add by themselves (Graham et al., SHARP, COMHPC 2016; Klenk et al., ISCA 2020). Over two levels
the leaf switches send their sums on to the spine. Pieces follow each other: one comes down while the next goes up.

Helper ranks follow the chips' ranks: one switch, or one leaf per bunch and then the spine; they have nothing of
their own. What a chip has itself is not sent to it: it is added, or was there, on its side.

Outlines are for levels whose switches reduce. A switch adds and copies as fast as its wires; a message up and one
down have one latency of the level together, and what a leaf sends to the spine has the rate of its bunch together
(a trunk wider than that is quicker for one piece). Not modelled: how many collectives a switch can hold.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil

import numpy as np

from comms.algorithms.rounds import Outlines, Schedules, check_ranks, checked_fanouts, folds
from comms.errors import CommsError
from comms.levels import Levels
from comms.outline import Hop, Outline, Stage
from comms.schedule import Channel, Op, Order, Pattern, Round, Schedule
from comms.topology import IntArray

NAME = "in-network"
FILLING = 1 / 32  # of the time with endless pieces, what filling the pipeline may cost more


def schedule(
    op: Op,
    num_ranks: int,
    root: int = 0,
    *,
    fanouts: Sequence[int] | None = None,
    pieces: int = 1,
) -> Schedule:
    """One level of switches, or with two fanouts two. Any operation of OUTLINES; `root` for those that have one."""
    check_ranks(num_ranks, root, pieces)
    parts = checked_fanouts(num_ranks, fanouts)
    if len(parts) > 2:
        raise CommsError(f"{len(parts)} levels of switches", NAME, "take one or two")
    bunch = parts[0] if parts else 1
    reduces, whole = op in (Op.ALL_REDUCE, Op.REDUCE, Op.REDUCE_SCATTER), op in WHOLE
    num_chunks = 1 if whole else num_ranks
    switches = _Switches(num_ranks, bunch, num_chunks, reduces)
    givers = np.array([root]) if op is Op.BROADCAST else np.arange(num_ranks)
    takers = np.array([root]) if op is Op.REDUCE else np.arange(num_ranks)
    phases = _MAKERS[op](switches, root)
    del givers, takers
    channels = (Channel(tuple((each,) for each in phases), pieces, Order.INTERLEAVED),) if phases else ()
    share = 0.0 if op is Op.BARRIER else 1.0 / num_chunks
    return Schedule(op, NAME, num_ranks, num_chunks, share, channels, root, switches.num_helpers)
