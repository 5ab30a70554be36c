"""Outlines: a symmetric collective reduced to the messages of representative chips.

Where all chips of a group do the same at other positions, the time of a schedule (`collectives.schedule`) is that of
a few representatives. A stage is `repeat` rounds alike. With one hop every chip sends a message over that hop
and gets an equal one back: one representative. With p hops the chips stand in a ring: position i sends over
hop i to position i + 1, the last one to the first, as in a flat ring over hosts of p chips, where one hop in p
leaves the host.

Outlines are what closed forms and the folded fidelity evaluate; full fidelity runs the schedule itself.
"""

from dataclasses import dataclass

from comms.collectives.schedule import Order


@dataclass(frozen=True, slots=True)
class Hop:
    """What one message costs: its latency, and the rate it gets with all that leaves at the same time."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Stage:
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
    phases: tuple[tuple[Stage, ...], ...]
    ports: tuple[int, ...]  # one per phase
    pieces: int = 1
    order: Order = Order.SERIAL
    beside: tuple["Outline", ...] = ()

    @property
    def channels(self) -> tuple["Outline", ...]:
        """This one and those beside it."""
        return (self, *self.beside)
