"""What links cost: units, links, networks and the collectives on them. Pure numbers: no torch, no ray.

    comms.estimate("all_reduce", 64e6, comms.Network.of((8, comms.Link(1e-6, 100e9)))).seconds

What is here is the interface for Python; it is imported when first used, so that `import comms` costs nothing.
"""

from typing import TYPE_CHECKING

from lazy_loader import attach

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

__getattr__, __dir__, __all__ = attach(
    __name__,
    submod_attrs={
        "collectives.proof": ["prove"],
        "collectives.schedule": ["Op", "Schedule"],
        "collectives.schedule_text": ["schedule_text"],
        "errors": ["UserError"],
        "networks.links": ["Link"],
        "networks.network": ["Network", "Tier"],
        "selection.choice": ["choose"],
        "selection.collective": ["estimate", "simulate"],
        "selection.question": ["Answer"],
        "synthesis.synthesis": ["synthesize"],
        "units": ["Quantity", "parse"],
    },
)
