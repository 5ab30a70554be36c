"""Closed walks over all chips of a mesh or torus, each chip once: Hamiltonian cycles, as orders of chips.

One cycle is a snake: layer by layer over the places 1, 2, ... of one dimension, and back home over place 0. It
exists unless all sides are odd and nothing wraps; then every cycle has a step of two, and the one here has one
such step, over links that no other step uses in that direction. A line of chips has only its natural order.

A torus with k dimensions of three or more chips falls apart into k cycles that share no link (Aubert and Schneider,
"Decomposition de la somme cartesienne d'un cycle et de l'union de deux cycles hamiltoniens en cycles
hamiltoniens", Discrete Mathematics 38, 1982). They are found by exchange: every dimension starts as one bundle of its
own rings; where two links of one bundle and two of another form a square, they change places if that leaves fewer
rings, until every bundle is one ring. This finds them for all squares, for sides up to 20 in two dimensions and up
to 8 in three; larger ones may defeat the search, which then gives up.

Chips are numbered as in `networks.fabrics.torus_mesh`.
"""

from math import prod

import numpy as np

from comms.networks.paths import mixed
from comms.networks.topology import IntArray

STEPS = 4 * 10**6  # chips walked past before the search for cycles without a shared link gives up
LEAST_TRIES = 64  # where fewer can be afforded the torus is too large to begin


def snake_path(dims: tuple[int, ...]) -> IntArray:
    """All chips, each a neighbour of the one before, from chip 0 on (Knuth 7.2.1.1: reflected mixed-radix code)."""
    index, chips, stride = np.arange(prod(dims)), np.zeros(prod(dims), dtype=np.int64), 1
    for size in dims:
        place = index // stride % size
        turned = index // (stride * size) % 2 == 1
        chips += np.where(turned, size - 1 - place, place) * stride
        stride *= size
    return chips


def torus_cycle(dims: tuple[int, ...], wraps: tuple[bool, ...]) -> IntArray:
    """All chips from chip 0 on, each a neighbour of the one before and the last of the first where that can be."""
    num_chips = prod(dims)
    for dim, size in enumerate(dims):
        layers = num_chips // size
        closes = size == 2 or (size > 2 and wraps[dim])
        if size > 1 and (closes or (layers > 1 and layers % 2 == 0)):
            return _layered(dims, dim)
    long = [dim for dim, size in enumerate(dims) if size > 1]
    return _odd_mesh(dims, long[0]) if len(long) > 1 else np.arange(num_chips)


def disjoint_cycles(dims: tuple[int, ...]) -> tuple[IntArray, ...]:
    """One cycle per dimension of a torus (three chips or more in each), no two over one link; () if none are found."""
    budget = STEPS // prod(dims)
    if budget < LEAST_TRIES:
        return ()
    bundles = _Bundles(dims)
    squares: list[tuple[int, int, int]] = [
        (chip, a, b) for chip in range(prod(dims)) for b in range(len(dims)) for a in range(b)
    ]
    bundles.join(squares)
    tried, patience = 0, 0
    while bundles.num_rings > len(dims):
        moved = False
        order: list[int] = np.argsort(mixed(np.arange(len(squares)) + tried * len(squares))).tolist()
        for chip, a, b in (squares[number] for number in order):
            if tried >= budget:
                return ()
            gain = bundles.exchanged(chip, a, b, patience > 0)
            tried += gain is not None
            if gain is not None and gain >= 0:
                moved, patience = True, patience - 1 if gain == 0 else 0
            if bundles.num_rings == len(dims):
                break
        if not moved:
            patience = 3  # a few exchanges that leave as many rings lead out of a dead end
    return tuple(bundles.walk(bundle) for bundle in range(len(dims)))


class _Bundles:
    """The links of a torus shared out to one bundle per dimension; every chip has two links of each bundle."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        self.num_chips = prod(dims)
        chips, stride = np.arange(self.num_chips), 1
        self.up: list[list[int]] = []
        self.ends: list[list[list[int]]] = []  # [bundle][chip] the chips it is linked to
        for size in dims:
            place = chips // stride % size
            up = chips + ((place + 1) % size - place) * stride
            down = chips + ((place - 1) % size - place) * stride
            self.up.append(up.tolist())
            self.ends.append(np.stack([up, down], axis=1).tolist())
            stride *= size
        self.bundle = [[dim] * self.num_chips for dim in range(len(dims))]  # [dim][chip] of the link upwards
        self.rings = [self.num_chips // size for size in dims]

    @property
    def num_rings(self) -> int:
        return sum(self.rings)

    def join(self, squares: list[tuple[int, int, int]]) -> None:
        """Exchanges at squares whose sides lie on four different rings, which joins two pairs of them."""
        on: list[list[int]] = [list(range(self.num_chips)) for _ in self.up]

        def ring(bundle: int, chip: int) -> int:
            while on[bundle][chip] != chip:
                on[bundle][chip] = on[bundle][on[bundle][chip]]
                chip = on[bundle][chip]
            return chip

        for dim, up in enumerate(self.up):
            for chip, beside in enumerate(up):
                on[dim][ring(dim, beside)] = ring(dim, chip)
        for chip, a, b in squares:
            beside, above = self.up[a][chip], self.up[b][chip]
            p, q = self.bundle[a][chip], self.bundle[b][chip]
            if p == q or self.bundle[a][above] != p or self.bundle[b][beside] != q:
                continue
            if ring(p, chip) != ring(p, above) and ring(q, chip) != ring(q, beside):
                self._swap((chip, beside, above, self.up[a][above]), p, q)
                self._hand_over(chip, a, b, p, q)
                on[p][ring(p, above)] = ring(p, chip)
                on[q][ring(q, beside)] = ring(q, chip)
                self.rings[p] -= 1
                self.rings[q] -= 1

    def _hand_over(self, chip: int, a: int, b: int, p: int, q: int) -> None:
        self.bundle[a][chip] = self.bundle[a][self.up[b][chip]] = q
        self.bundle[b][chip] = self.bundle[b][self.up[a][chip]] = p

    def exchanged(self, chip: int, a: int, b: int, even: bool) -> int | None:
        """Rings fewer after the exchange at one square (an `even` one may leave as many), None if there is none."""
        beside, above = self.up[a][chip], self.up[b][chip]
        corners = (chip, beside, above, self.up[a][above])
        p, q = self.bundle[a][chip], self.bundle[b][chip]
        if p == q or self.bundle[a][above] != p or self.bundle[b][beside] != q:
            return None
        self._swap(corners, p, q)
        rings = (self._count(p), self._count(q))
        gain = self.rings[p] + self.rings[q] - sum(rings)
        if gain < 0 or (gain == 0 and not even):
            self._swap(corners, q, p)
            return -1
        self.rings[p], self.rings[q] = rings
        self._hand_over(chip, a, b, p, q)
        return gain

    def _swap(self, corners: tuple[int, int, int, int], p: int, q: int) -> None:
        """Bundle p gives its two sides of the square for those of bundle q."""
        chip, beside, above, far = corners
        for corner, of_p, of_q in (
            (chip, beside, above),
            (beside, chip, far),
            (above, far, chip),
            (far, above, beside),
        ):
            _replace(self.ends[p][corner], of_p, of_q)
            _replace(self.ends[q][corner], of_q, of_p)

    def _count(self, bundle: int) -> int:
        seen = bytearray(self.num_chips)
        rings = 0
        for start in range(self.num_chips):
            if not seen[start]:
                rings += 1
                for chip in self._ring(bundle, start):
                    seen[chip] = 1
        return rings

    def _ring(self, bundle: int, start: int) -> list[int]:
        ends = self.ends[bundle]
        ring, before, chip = [start], start, ends[start][0]
        while chip != start:
            ring.append(chip)
            one, other = ends[chip]
            before, chip = chip, other if one == before else one
        return ring

    def walk(self, bundle: int) -> IntArray:
        """The ring of a bundle that chip 0 is on."""
        return np.array(self._ring(bundle, 0), dtype=np.int64)


def _replace(ends: list[int], old: int, new: int) -> None:
    ends[ends.index(old)] = new


def _layers(dims: tuple[int, ...], dim: int) -> tuple[IntArray, int]:
    """A path over the chips at place 0 of one dimension, and the step to the next place."""
    inner = prod(dims[:dim])
    path = snake_path((*dims[:dim], *dims[dim + 1 :]))
    return path % inner + path // inner * inner * dims[dim], inner


def _layered(dims: tuple[int, ...], dim: int) -> IntArray:
    """Home, over places 1 and up of every layer there and back, and home over place 0 of all layers."""
    path, stride = _layers(dims, dim)
    places = np.tile(np.arange(1, dims[dim]), (len(path), 1))
    places[1::2] = places[1::2, ::-1]
    out = (path[:, None] + places * stride).ravel()
    back = path[::-1]
    return np.concatenate([back[-1:], out, back[:-1]])


def _odd_mesh(dims: tuple[int, ...], dim: int) -> IntArray:
    """A cycle over rows 1 and up of a mesh of odd sides, with row 0 taken in pairs on the way along row 1.

    The corner that is left is visited between the first two chips of row 1.
    """
    path, stride = _layers(dims, dim)
    rows, columns = dims[dim], len(path)
    walk: list[tuple[int, int]] = [(1, 0), (0, 0)]
    for column in range(1, columns, 2):
        walk += [(1, column), (0, column), (0, column + 1), (1, column + 1)]
    for row in range(2, rows):
        across = range(1, columns) if row % 2 else range(columns - 1, 0, -1)
        walk += [(row, column) for column in across]
    walk += [(row, 0) for row in range(rows - 1, 1, -1)]
    row_of, column_of = np.array(walk).T
    order = path[column_of] + row_of * stride
    return np.roll(order, -int(np.argmin(order)))
