"""Side by side: the time of channels that share the wires of a representative chip.

Each channel (`collectives.outline`) sends one message after another, each when the one before has arrived. Those that
use a port at the same time share its rate equally, as max-min fairness has it for flows with one wire each
(processor sharing; Kleinrock, Queueing Systems II, 1976, section 4.4). Where all chips stand alike, as around the
rings of a torus, this is what happens at every chip.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from comms.collectives.outline import Outline

ROUNDING = 1e-12  # of a message: what is left of it is nothing


@dataclass(slots=True)
class _Message:
    """What is left of a message, in seconds: on the wire if it had the port alone, and after that on its way."""

    port: int
    wire_s: float
    way_s: float

    def next_event_s(self, senders: Counter[int]) -> float:
        return self.wire_s * senders[self.port] if self.wire_s > 0 else self.way_s

    def moved_on(self, seconds: float, senders: Counter[int]) -> "_Message":
        """The same after so long, in which nothing began or ended."""
        if self.wire_s > 0:
            left = self.wire_s - seconds / senders[self.port]
            return _Message(self.port, left if left > self.wire_s * ROUNDING else 0.0, self.way_s)
        left = self.way_s - seconds
        return _Message(self.port, 0.0, left if left > self.way_s * ROUNDING else 0.0)


def side_by_side_seconds(outline: Outline) -> float:
    """Time until all channels of an outline have ended, everyone being ready at 0."""
    coming = [_messages(each) for each in outline.channels]
    under_way = [next(messages, None) for messages in coming]
    now = 0.0
    while any(under_way):
        senders = Counter(each.port for each in under_way if each and each.wire_s > 0)
        step = min(each.next_event_s(senders) for each in under_way if each)
        now += step
        for channel, each in enumerate(under_way):
            if each:
                left = each.moved_on(step, senders)
                ended = left.wire_s == left.way_s == 0
                under_way[channel] = next(coming[channel], None) if ended else left
    return now


def _messages(outline: Outline) -> Iterator[_Message]:
    """The messages of a channel, in order."""
    for phase, port in zip(outline.phases, outline.ports, strict=True):
        for stage in phase:
            (hop,) = stage.hops
            for _ in range(stage.repeat):
                yield _Message(port, stage.nbytes / hop.bytes_per_s, hop.latency_s)
