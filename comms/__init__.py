"""What links cost: units, links, networks and the collectives on them. Pure numbers: no torch, no ray.

    comms.estimate("all_reduce", 64e6, comms.Network.of((8, comms.Link(1e-6, 100e9)))).seconds

What is here is the interface for Python; it is imported when first used, so that `import comms` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comms.collectives.proof import prove
    from comms.collectives.schedule import Op, Schedule
    from comms.collectives.schedule_text import schedule_text
    from comms.errors import UserError
    from comms.networks.links import Link
    from comms.networks.network import Network, Tier
    from comms.selection.choice import choose
    from comms.selection.collective import estimate, simulate
    from comms.selection.question import Answer
    from comms.synthesis.synthesis import synthesize
    from comms.units import Quantity, parse

__all__ = [
    "Answer",
    "Link",
    "Network",
    "Op",
    "Quantity",
    "Schedule",
    "Tier",
    "UserError",
    "choose",
    "estimate",
    "parse",
    "prove",
    "schedule_text",
    "simulate",
    "synthesize",
]

_HOMES = {
    "Answer": "comms.selection.question",
    "Link": "comms.networks.links",
    "Network": "comms.networks.network",
    "Op": "comms.collectives.schedule",
    "Quantity": "comms.units",
    "Schedule": "comms.collectives.schedule",
    "Tier": "comms.networks.network",
    "UserError": "comms.errors",
    "choose": "comms.selection.choice",
    "estimate": "comms.selection.collective",
    "parse": "comms.units",
    "prove": "comms.collectives.proof",
    "schedule_text": "comms.collectives.schedule_text",
    "simulate": "comms.selection.collective",
    "synthesize": "comms.synthesis.synthesis",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
