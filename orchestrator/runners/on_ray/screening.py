"""Screening: which tensors an end takes from whom, beyond what `header` and `peer_keys` make sure of.

Actors exchange communications of their own chips, the driver sends values, batches and states, and is sent states and
measured intervals. All else is a BadMessage, whose sender is not listened to any longer.
"""

from collections.abc import Sequence

from orchestrator.runners.executing.header import BadMessage
from orchestrator.runners.executing.transport import Arrival

DRIVER = -1  # the driver's number among the actors
FROM_DRIVER = ("value", "batch", "state")
TO_DRIVER = ("marks", "state")


def require_of_chips(message: Arrival, actor_of: Sequence[int], actor: int) -> None:
    """A communication from a chip of the sender's to one of `actor`, both members of it. Raises BadMessage."""
    kind, chips, _ = message.key
    if kind == "p2p" and (len(chips) != 2 or message.source != chips[0]):
        raise BadMessage(f"a transfer among chips {chips} from chip {message.source}")
    if not chips or max(chips) >= len(actor_of) or message.source not in chips:
        raise BadMessage(f"a communication of chips {chips} from chip {message.source}")
    if actor_of[message.source] != message.sender:
        raise BadMessage(f"what chip {message.source} sends, which it does not have")
    if not any(actor_of[chip] == actor for chip in chips):
        raise BadMessage(f"a communication of chips {chips}, none of which is here")


def require_of_driver(message: Arrival) -> None:
    """What only the driver hands out. Raises BadMessage."""
    if message.sender != DRIVER or _family(message) not in FROM_DRIVER:
        raise BadMessage(f"a {_family(message)[:20]!r}")


def require_report(message: Arrival, actor_of: Sequence[int]) -> None:
    """What an actor tells the driver of itself and its chips. Raises BadMessage."""
    family = _family(message)
    own = family == "marks" and message.key.number == message.sender
    chips = message.key.chips
    own |= (
        family == "state"
        and len(chips) == 1
        and chips[0] < len(actor_of)
        and actor_of[chips[0]] == message.sender
    )
    if not own:
        raise BadMessage(f"a {family[:20]!r} that is not its own")


def _family(message: Arrival) -> str:
    return message.key.kind.partition(":")[0]
