"""Trees of switches: one crossbar, PCIe, leaf-spine and fat trees, with shared NICs, rails and oversubscription.

Chips hang on switches by ports; trunks lead from the switches of one layer to those of the next, up to one over all.
A crossbar has no trunks; a network card shared by four chips is a trunk of size 4. A message climbs to the first
switch over both its ends and comes down again. Positions are the numbers of chips.

Rails (leaf switch r of a pod holds card number r of every host): what hangs below a layer is dealt out to the
switches of a group in turn, so that chips with the same place in their hosts meet there, all others further up.

Parallel paths of a trunk lead to planes of their own: a message comes down in the plane in which it went up.
Adaptive spread is the default, as InfiniBand and Ethernet for training spread the packets of one message over all
paths, and as without it what a group costs depends on which paths happen to be chosen; all paths are then one pipe.
Hashed is ECMP: a message stays on one path and may meet others there. By target is the static routing of fat trees
(d-mod-k; Zahavi, J. Parallel Distrib. Comput. 72, 2012).

Not modelled: buffers and loss in switches, and where in a switch its ports are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import inf, isfinite

import numpy as np

from comms.errors import CommsError
from comms.networks.groups import Lattice, Level, Levels, Members, group_size
from comms.networks.layers import SWITCH, Layer, Spread, Switch, Trunk, alone, folded, loaded
from comms.networks.links import Link
from comms.networks.paths import mixed
from comms.networks.topology import IntArray, Routes, Ways, Wires, routes_of

IN_OUT = (False, True)  # the two nodes of a switch


@dataclass(frozen=True, slots=True)
class Tree:
    """Chips, their ports, and trunks from the inside out; `switch` is the one that ports lead to."""

    num_chips: int
    port: Link  # one chip to its switch, one direction
    switch: Switch = SWITCH
    trunks: tuple[Trunk, ...] = ()
    duplex: bool = True  # of the ports; else both directions share the rate
    spread: Spread = Spread.ADAPTIVE

    def __post_init__(self) -> None:
        if self.num_chips < 1:
            raise CommsError(f"{self.num_chips} chips", self.switch.tier, "give at least one chip")
        # A message comes down in the plane in which it went up, so the planes of a layer must divide those of the next
        # one: its plane further in is what is left of its plane further out (see `_planes`).
        size, rails, planes = 1, 1, 1
        for number, trunk in enumerate(self.trunks):
            where = f"trunk to {trunk.to.tier}"
            if trunk.size % size or (trunk.size == size and number):
                raise CommsError(
                    f"{trunk.size} chips are not whole groups of {size}", where, "let sizes nest"
                )
            if trunk.size // size * rails % trunk.rails:
                problem = (
                    f"{trunk.size // size * rails} of what is below do not spread over {trunk.rails} rails"
                )
                raise CommsError(problem, where, "make rails a divisor of it")
            if trunk.size >= self.num_chips and trunk.rails == 1:
                raise CommsError(f"{self.num_chips} chips are all below it", where, "leave it out")
            if self.spread is not Spread.ADAPTIVE and trunk.paths % planes:
                problem = f"{trunk.paths} paths do not spread over the {planes} planes below"
                raise CommsError(problem, where, "make paths a multiple of those of the trunk inside")
            size, rails, planes = trunk.size, trunk.rails, trunk.paths

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of switches, innermost first."""
        ups = (Trunk(1, self.port, self.switch, duplex=self.duplex), *self.trunks)
        layers: list[Layer] = []
        children, planes = self.num_chips, 1  # in the layer inside
        width, rails_below = 1, 1
        for number, up in enumerate(ups):
            top = number == len(self.trunks)
            size = self.num_chips if top else min(self.trunks[number].size, self.num_chips)
            rails = 1 if top else self.trunks[number].rails
            # Packets of a message that are sprayed over all paths see one wire with the rate of all.
            planes = 1 if self.spread is Spread.ADAPTIVE else up.paths
            rate = up.link.bytes_per_s * up.paths / planes
            over_all = size == self.num_chips  # one group of switches, for the chips that there are
            per_switch = -(-children // rails) if over_all else size // width * rails_below // rails
            backplane = per_switch * rate / up.to.oversubscription if up.to.oversubscription > 1 else inf
            count = -(-self.num_chips // size) * rails
            chips = -(-size // rails)
            layers.append(
                Layer(up.to, size, rails, chips, count, planes, up.link.latency_s, rate, up.duplex, backplane)
            )
            children, width, rails_below = count, size, rails
        return tuple(layers)

    @property
    def num_nodes(self) -> int:
        """Chips, then the switches layer by layer, then the ways out of those that limit what they pass."""
        return _Numbers.of(self).first_way_out[-1]

    @property
    def num_wires(self) -> int:
        """As many as `wires` has, without making them."""
        return _Numbers.of(self).first_backplane[-1]

    @property
    def tiers(self) -> tuple[str, ...]:
        """One name per layer; layers of one name are one tier."""
        return tuple(dict.fromkeys(layer.switch.tier for layer in self.layers))

    @property
    def link(self) -> Link:
        """What one message alone has between chips that are furthest apart (on one rail)."""
        return alone(self._reaching)

    @property
    def loaded_link(self) -> Link:
        """What each chip has when all send that far at once."""
        return loaded(self._reaching)

    @property
    def _reaching(self) -> tuple[Layer, ...]:
        """The layers that a message between the chips furthest apart crosses, if it stays on its rail."""
        layers = self.layers
        last = next(i for i, layer in enumerate(layers) if layer.size >= self.num_chips)
        return layers[: last + 1]

    def cut(self, num_chips: int) -> "Tree":
        """What the first chips need of the tree.

        Trunks keep their rates, as switches do that others share. Where one group of switches is left over all
        chips, what it passes by its oversubscription is counted from those chips.
        """
        kept: list[Trunk] = []
        children = num_chips  # what hangs below, in switches of the layer inside
        for trunk in self.trunks:
            if trunk.size >= num_chips and (trunk.rails == 1 or children == 1):
                break
            kept.append(trunk)
            children = -(-num_chips // trunk.size) * trunk.rails
        return replace(self, num_chips=num_chips, trunks=tuple(kept))

    def levels(self, members: Members, inner: int = 1, aligned: bool = False) -> Levels | None:
        """How a group of chips folds over the tree; see `networks.layers.folded`."""
        return folded(self.layers, members, inner, aligned)

    def level_between(self, members: Members, inner: int, subgroups: int) -> Level:
        """What equal subgroups, each in a block of `inner` chips, have if every two meet in the outermost layer.

        They may sit unevenly on the layers in between: the fullest switch of each counts. Messages are taken to
        spread evenly over parallel paths, and switches to send on at once.
        """
        layers = self.layers
        fullest = self._fullest(members)
        link = alone(layers)
        rates = [layer.bytes_per_s_up for layer in layers]
        # The copies of a Lattice are busy too: of a wire up, a message has the share of its own group's chips below it.
        if isinstance(members, Lattice):
            inside = [1, *(members.within(layer.size).num_chips for layer in layers)]
            rates = [
                rate * min(1.0, mine / every)
                for rate, mine, every in zip(rates, inside, [1, *fullest], strict=False)
            ]
        busy = [replace(layer, chips=count) for layer, count in zip(layers, fullest, strict=True)]
        return Level(
            layers[-1].switch.tier,
            subgroups,
            link.latency_s,
            min(link.bytes_per_s, *rates),
            group_size(members) // subgroups * loaded(busy).bytes_per_s,
            reduces=all(layer.switch.reduces for layer in layers if layer.size > inner),
            shared=any(isfinite(layer.backplane) or not layer.duplex for layer in layers),
        )

    def _fullest(self, members: Members) -> list[int]:
        """[layers] Busy chips under the switch that has most; copies of a Lattice keep all chips busy."""
        numbers = _Numbers.of(self)
        if isinstance(members, Lattice):
            return [layer.chips for layer in numbers.layers]
        places = np.asarray(members, dtype=np.int64)
        counts: list[int] = []
        for at in range(len(numbers.layers)):
            places = numbers.parents(at, places)
            counts.append(int(np.unique(places, return_counts=True)[1].max()))
        return counts

    def switches(self, layer: int) -> IntArray:
        """The nodes of the switches of a layer, 0 the innermost: plane by plane within each place."""
        numbers = _Numbers.of(self)
        return np.arange(numbers.first_node[layer], numbers.first_node[layer + 1])

    def switch_over(self, chips: IntArray) -> int:
        """The node of the innermost switch (of the first plane) over all of these chips."""
        numbers = _Numbers.of(self)
        ends = _ends(numbers, chips)
        at = next(i for i, places in enumerate(ends.places[1:]) if (places == places[0]).all())
        return int(numbers.first_node[at] + ends.places[at + 1][0] * numbers.layers[at].planes)

    def wires(self) -> Wires:
        """Layer by layer from the inside: all wires up, then all down; then the backplanes."""
        return _wires(_Numbers.of(self))

    def routes(self, src: IntArray, dst: IntArray) -> Routes:
        """One route per pair of chips, or of a chip and a switch above it (any two switches of one plane)."""
        return _routes(_Numbers.of(self), self.spread, src, dst)

    def ways(self, src: IntArray, dst: IntArray) -> Ways:
        """One for each message."""
        return Ways.single(self.routes(src, dst))


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Where the nodes and wires of each layer start; no arrays."""

    num_chips: int
    layers: tuple[Layer, ...]
    first_node: tuple[int, ...]  # [layers + 1] of its switches; the last is the first way out
    first_way_out: tuple[int, ...]  # [layers + 1] of those with a limit
    first_wire: tuple[int, ...]  # [layers + 1] upwards; the last is the first backplane
    first_backplane: tuple[int, ...]  # [layers + 1]

    @classmethod
    def of(cls, tree: Tree) -> "_Numbers":
        layers = tree.layers
        nodes, wires, inside = [tree.num_chips], [0], tree.num_chips
        limited = [0]
        for layer in layers:
            nodes.append(nodes[-1] + layer.count * layer.planes)
            wires.append(wires[-1] + 2 * inside * layer.planes)
            limited.append(limited[-1] + (layer.count * layer.planes if layer.backplane < inf else 0))
            inside = layer.count
        outs, planes = [nodes[-1] + n for n in limited], [wires[-1] + n for n in limited]
        return cls(tree.num_chips, layers, tuple(nodes), tuple(outs), tuple(wires), tuple(planes))

    def inside(self, layer: int) -> int:
        """Children of a layer: places in the layer inside it."""
        return self.layers[layer - 1].count if layer else self.num_chips

    def downwards(self, layer: int) -> int:
        """The first wire down from a layer."""
        return self.first_wire[layer] + self.inside(layer) * self.layers[layer].planes

    def parents(self, layer: int, children: IntArray) -> IntArray:
        """Places in a layer above places in the one inside it (chips, for layer 0)."""
        below = self.layers[layer - 1] if layer else None
        # What hangs below is dealt out to the rails in turn: child r of a group goes to rail r, and what is on a rail
        # stays on it further up, as long as there are rails.
        size, rails = (below.size, below.rails) if below else (1, 1)
        here = self.layers[layer]
        places: IntArray = children // rails * size // here.size * here.rails + children % here.rails
        return places

    def node(self, layer: int, places: IntArray, planes: IntArray, out: bool) -> IntArray:
        """Where a wire enters a switch, or where it leaves it (`out`)."""
        # A switch that limits what it passes is two nodes with a wire between them, which all that passes shares.
        limited = self.layers[layer].backplane < inf
        first = self.first_way_out[layer] if out and limited else self.first_node[layer]
        return first + places * self.layers[layer].planes + planes


def joined(parts: Sequence[Wires]) -> Wires:
    """Wires of several parts, one after another; their numbers must fit already."""
    columns = [np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Wires)]
    return Wires(*columns)


def _wires(numbers: _Numbers) -> Wires:
    names = tuple(dict.fromkeys(layer.switch.tier for layer in numbers.layers))
    parts: list[Wires] = []
    for at, layer in enumerate(numbers.layers):
        tier = names.index(layer.switch.tier)
        rows = np.arange(numbers.inside(at) * layer.planes)
        child, plane = rows // layer.planes, rows % layer.planes
        below = numbers.layers[at - 1] if at else None
        inner_in, inner_out = child, child
        if below:
            inner_in, inner_out = (numbers.node(at - 1, child, plane % below.planes, out) for out in IN_OUT)
        outer_in, outer_out = (numbers.node(at, numbers.parents(at, child), plane, out) for out in IN_OUT)
        ups, downs = numbers.first_wire[at] + rows, numbers.downwards(at) + rows
        figures = (layer.latency_s, layer.bytes_per_s, tier)
        taken_in = below.switch.forward_nbytes if below else 0.0
        parts.append(_part(inner_out, outer_in, ups, layer.switch.forward_nbytes, figures))
        parts.append(_part(outer_out, inner_in, downs if layer.duplex else ups, taken_in, figures))
    for at, layer in enumerate(numbers.layers):
        if layer.backplane < inf:
            rows = np.arange(layer.count * layer.planes)
            figures = (0.0, layer.backplane, names.index(layer.switch.tier))
            inwards, outwards = numbers.first_node[at] + rows, numbers.first_way_out[at] + rows
            parts.append(_part(inwards, outwards, numbers.first_backplane[at] + rows, 0.0, figures))
    return joined(parts)


def _part(
    tail: IntArray, head: IntArray, shares: IntArray, forward: float, figures: tuple[float, float, int]
) -> Wires:
    """Wires that are alike but for their ends: latency, rate and tier in `figures`."""
    latency, rate, tier = (np.full(len(tail), figure) for figure in figures)
    return Wires(tail, head, latency, rate, np.full(len(tail), forward), tier, shares)


@dataclass(frozen=True, slots=True, eq=False)
class _Ends:
    """One end of each message: its layer (-1 for a chip), its plane there, and its place in every layer above."""

    layer: IntArray
    plane: IntArray
    places: tuple[IntArray, ...]  # layer -1 first; -1 in layers below its own


def _ends(numbers: _Numbers, nodes: IntArray) -> _Ends:
    nodes = np.asarray(nodes, dtype=np.int64)
    bounds = np.array([numbers.num_chips, *numbers.first_node[1:]])
    layer = np.searchsorted(bounds, nodes, side="right") - 1
    if len(nodes) and not (nodes.min() >= 0 and layer.max() < len(numbers.layers)):
        raise CommsError(f"nodes are 0 to {bounds[-1] - 1}", numbers.layers[0].switch.tier)
    plane = np.zeros_like(nodes)
    place = np.where(layer < 0, nodes, -1)
    places = [place]
    for at, each in enumerate(numbers.layers):
        own = layer == at
        number = nodes - numbers.first_node[at]
        place = np.where(own, number // each.planes, np.where(layer < at, numbers.parents(at, place), -1))
        plane = np.where(own, number % each.planes, plane)
        places.append(place)
    return _Ends(layer, plane, tuple(places))


def _routes(numbers: _Numbers, spread: Spread, src: IntArray, dst: IntArray) -> Routes:
    """Up to the first layer where both ends are in one place, in the plane chosen there, and down again."""
    start, end = _ends(numbers, src), _ends(numbers, dst)
    # From the outside in, so that the innermost layer with both ends in one place is what remains.
    meet = np.full(len(start.layer), len(numbers.layers) - 1)
    for at in range(len(numbers.layers) - 1, -2, -1):
        met = (start.places[at + 1] == end.places[at + 1]) & (start.places[at + 1] >= 0)
        meet = np.where(met, at, meet)
    chosen = _planes(numbers, spread, np.asarray(src), np.asarray(dst), meet, (start, end))
    up: list[IntArray] = []
    down: list[IntArray] = []
    for at, layer in enumerate(numbers.layers):
        plane = chosen % layer.planes
        climbs, falls = (start.layer < at) & (at <= meet), (end.layer < at) & (at <= meet)
        first = start.places[at] * layer.planes + plane
        last = end.places[at] * layer.planes + plane
        up.append(np.where(climbs, numbers.first_wire[at] + first, -1))
        down.append(np.where(falls, numbers.downwards(at) + last, -1))
        if layer.backplane < inf:  # crossed by what goes on, not by what ends in the switch
            passes = (start.layer <= at) & (at < meet) | (at == meet) & falls
            through = start.places[at + 1] * layer.planes + plane
            up.append(np.where(passes, numbers.first_backplane[at] + through, -1))
            through = end.places[at + 1] * layer.planes + plane
            down.append(np.where(falls & (at < meet), numbers.first_backplane[at] + through, -1))
    return routes_of([*up, *reversed(down)])


def _planes(
    numbers: _Numbers,
    spread: Spread,
    src: IntArray,
    dst: IntArray,
    meet: IntArray,
    ends: tuple[_Ends, _Ends],
) -> IntArray:
    """[messages] The plane in the layer where the ends meet; further in it is the remainder by the planes there."""
    planes = np.array([layer.planes for layer in numbers.layers])
    # One number for the whole way: what it leaves over the planes of a layer is the plane there.
    chosen: IntArray = (dst if spread is Spread.BY_TARGET else _hashed(src, dst)) % planes[meet]
    for end in ends:  # a switch is reached in its own plane
        own = np.where(end.layer >= 0, planes[end.layer], 1)
        chosen = chosen - chosen % own + end.plane
    # Two switches may each ask for a plane that the other is not in, and then there is no way between them.
    for end in ends:
        own = np.where(end.layer >= 0, planes[end.layer], 1)
        if np.any((end.layer > meet) | (chosen % own != end.plane)):
            raise CommsError("no route between switches of different planes", numbers.layers[-1].switch.tier)
    return chosen


def _hashed(src: IntArray, dst: IntArray) -> IntArray:
    """A number from 0 to 2**62 - 1 for each pair of ends."""
    # Mixed twice, so that (a, b) and (b, a) differ: the way back need not be the way there.
    bits: IntArray = (mixed(mixed(src) + dst.astype(np.uint64)) >> np.uint64(2)).astype(np.int64)
    return bits
