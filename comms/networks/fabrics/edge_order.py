"""Edge order: the same edges in the same order, however a file lists, turns and names them.

Chips are told apart by number, switches by what they are joined to: colours are refined by those of neighbours until
none changes (Weisfeiler and Leman, 1968); then switches whose neighbours are all known are alike and keep the order
that they have, else the first of a colour is set apart and colours are refined again. Not told apart: switches that
this refinement cannot tell apart though they differ, which keep the order that they have.
"""

import numpy as np
from numpy.typing import NDArray

from comms.networks.paths import mixed
from comms.networks.topology import FloatArray, IntArray

Bits = NDArray[np.uint64]


def edge_order(
    ends: IntArray, figures: FloatArray, num_chips: int, num_nodes: int
) -> tuple[IntArray, IntArray]:
    """Edges in their order, and the rank of every node in that order.

    `ends` [edges, 2] are the two nodes of each, `figures` [edges, f] what tells edges of the same ends apart: those
    from the first to the second node in the first half of the columns, those back in the second half.
    """
    half = figures.shape[1] // 2
    both = np.concatenate([figures, np.roll(figures, half, axis=1)])
    tail, head = np.concatenate([ends, ends[:, ::-1]]).T
    kind = np.unique(both, axis=0, return_inverse=True)[1].ravel().astype(np.uint64)
    rank = _ranks(tail, head, mixed(kind), num_chips, num_nodes)
    turned = rank[ends[:, 0]] > rank[ends[:, 1]]
    low, high = np.sort(rank[ends], axis=1).T
    columns = np.where(turned[:, None], np.roll(figures, half, axis=1), figures)
    return np.lexsort((*columns.T[::-1], high, low)), rank


def _ranks(tail: IntArray, head: IntArray, kind: Bits, num_chips: int, num_nodes: int) -> IntArray:
    colour = np.minimum(np.arange(num_nodes), num_chips)
    while True:
        colour = _refined(colour, tail, head, kind)
        count = np.bincount(colour, minlength=num_nodes)[colour]
        open_nodes = np.flatnonzero(count > 1)
        if not len(open_nodes):
            return colour
        known = np.ones(num_nodes, dtype=np.bool_)
        np.logical_and.at(known, tail, count[head] == 1)
        apart = open_nodes[known[open_nodes]]
        if not len(apart):
            apart = open_nodes[colour[open_nodes] == colour[open_nodes].min()][:1]
        extra = np.full(num_nodes, num_nodes)
        extra[apart] = apart
        colour = np.unique(colour * (num_nodes + 1) + extra, return_inverse=True)[1]


def _refined(colour: IntArray, tail: IntArray, head: IntArray, kind: Bits) -> IntArray:
    """Colours, numbered in an order that the numbers of nodes and edges have no part in."""
    while True:
        seen = np.zeros(len(colour), dtype=np.uint64)
        np.add.at(seen, tail, mixed(mixed(colour[head]) ^ kind))
        order = np.lexsort((seen, colour))
        new = (np.diff(colour[order], prepend=-1) != 0) | (np.diff(seen[order], prepend=np.uint64(0)) != 0)
        new[:1] = False
        finer = np.empty_like(colour)
        finer[order] = np.cumsum(new)
        if finer.max(initial=0) == colour.max(initial=0):
            return finer
        colour = finer
