"""Links: how long one message occupies one wire.

Hockney's model, seconds = latency + nbytes / bytes_per_s (Parallel Computing 20, 1994), for every kind of
link from an on-chip hop to a data-centre network; only the two numbers differ, by four orders of magnitude.

Assumes the link is idle and the rate is sustained, one direction. Not modelled: contention between messages,
protocol switches by message size (eager and rendezvous), and packet headers.
"""

from dataclasses import dataclass


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
