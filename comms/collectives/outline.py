"""Outlines: a symmetric collective reduced to the messages of representative chips.

Where all chips of a group do the same at other positions, the time of a schedule (`collectives.schedule`) is that of
a few representatives. A stage is `repeat` rounds alike. With one hop every chip sends a message over that hop
and gets an equal one back: one representative. With p hops the chips stand in a ring: position i sends over
hop i to position i + 1, the last one to the first, as in a flat ring over hosts of p chips, where one hop in p
leaves the host.

Outlines are what closed forms and the folded fidelity evaluate; full fidelity runs the schedule itself.

Algorithms state their outlines by hand, beside their schedules. To derive them was tried: rounds in which all ranks
send alike became stages, by the outermost digit in which the ends of a message differ. That gave the same seconds for
36 of 106 pairs of algorithm and operation (24 of them bit for bit, on 26 shapes of switches and tori), and nothing
for the rest: from or to a root some are silent, channels go side by side, a flat round crosses several levels at
once. It takes a schedule as large as the group: 60 ms (halving-doubling), 2.4 s (hierarchical ring) and 16 s (Bruck)
for 4,096 chips, where outlines by hand take 0.2 ms at most, and as little for 100,000.
"""

from dataclasses import dataclass

from comms.collectives.schedule import PieceOrder


@dataclass(frozen=True, slots=True)
class Hop:
    """What one message costs: its latency, and the rate it gets with all that leaves at the same time."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class OutlineStage:
    """`repeat` rounds in each of which every position sends nbytes (all pieces together)."""

    repeat: int
    nbytes: float
    hops: tuple[Hop, ...]
    own_ports: bool = (
        False  # each round's messages leave by wires of their own (a tree's levels, a chain's chips)
    )


@dataclass(frozen=True, slots=True)
class Outline:
    """Phases in order; those with the same `ports` number leave by the same wires of a chip.

    Channels `beside` start at the same time and go on by themselves; they share the rate of ports that they use at
    the same time. Outlines with such have one position and one piece, and all ports are the chip's own wires.
    """

    algorithm: str
    phases: tuple[tuple[OutlineStage, ...], ...]
    ports: tuple[int, ...]  # one per phase
    pieces: int = 1
    order: PieceOrder = PieceOrder.SERIAL
    beside: tuple["Outline", ...] = ()

    @property
    def channels(self) -> tuple["Outline", ...]:
        """This one and those beside it."""
        return (self, *self.beside)
