"""Links and protocols: how long one message occupies one wire.

Hockney's model, seconds = latency + nbytes / bytes_per_s (Parallel Computing 20, 1994), for every kind of
link from an on-chip hop to a data-centre network; only the two numbers differ, by four orders of magnitude.

Communication libraries trade latency for bandwidth by message size: eager messages are copied but need no
handshake, rendezvous pays a round trip and then moves at full rate; NCCL's LL and LL128 pay for flags inside
the data with a share of the bandwidth. All are the same two numbers more per protocol, and the fastest is used.

Assumes the rate is sustained, one direction. Collectives spell the same sum out over many messages at once:
by levels in `Level.under` and `collectives.outline_time`, message by message in `simulation`, which also shares wires.
"""

from dataclasses import dataclass
from math import sqrt


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of one link."""

    latency_s: float  # first byte in to first byte out
    bytes_per_s: float  # sustained, one direction

    def __post_init__(self) -> None:
        if self.latency_s < 0 or self.bytes_per_s <= 0:
            raise ValueError(f"a link needs latency_s >= 0 and bytes_per_s > 0, got {self}")

    def seconds(self, nbytes: float) -> float:
        """Time until the last byte has arrived, on an otherwise idle link."""
        return self.latency_s + nbytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Protocol:
    """One way in which a library moves messages: what it adds to every hop between chips, what it leaves."""

    name: str
    latency_s: float = 0.0  # per message, on top of the link's
    share: float = 1.0  # of the link's bandwidth, 0 < share <= 1
    pipelined: bool = False  # a collective's stages pass on pieces of the best size, see `pipeline_fill_s`
    algorithms: tuple[str, ...] = ()  # those that the library offers with it; none named: all
    ops: tuple[str, ...] = ()  # operations that the library has it for; none named: all

    def __post_init__(self) -> None:
        if self.latency_s < 0 or not 0 < self.share <= 1:
            raise ValueError(f"a protocol needs latency_s >= 0 and 0 < share <= 1, got {self}")

    def pipeline_fill_s(self, latency_s: float, wire_s: float) -> float:
        """What a collective takes beyond its latencies and its bytes, because stages hand pieces on.

        With m pieces, s stages of latency a and bytes that take w in all: (s + m) * (a + w / m), at the best m
        (sqrt(s a) + sqrt(w)) ** 2 (Sanders, Speck and Traff, Parallel Computing 35, 2009); this is the excess
        over s a + w, both given as sums over the stages.
        """
        return 2 * sqrt(latency_s * wire_s) if self.pipelined else 0.0

    def on(self, link: Link) -> Link:
        """The link as messages of this protocol see it."""
        return Link(link.latency_s + self.latency_s, link.bytes_per_s * self.share)


PLAIN = Protocol("plain")
