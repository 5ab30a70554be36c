"""The static check: is this Program well formed, does it use its tensors rightly, and can it never hang?

Three passes, each trusting the one before: `structure.py`, `lifetimes.py`, `rendezvous.py`. A Program without
findings runs to the end of every schedule on any number of chips, under zero buffering. Not checked: numerics, and
that operations give what their specs promise.
"""

from collections.abc import Iterator
from itertools import islice

from comms.errors import ProgramError
from partitioner.program.findings import Finding
from partitioner.program.lifetimes import check_lifetimes
from partitioner.program.program import Program
from partitioner.program.rendezvous import check_rendezvous
from partitioner.program.structure import check_structure

MOST_FINDINGS = 50  # later ones mostly follow from earlier ones


def check_program(program: Program) -> tuple[Finding, ...]:
    """All findings (the first 50), the most basic first; empty if the Program is valid."""
    structure = tuple(islice(check_structure(program), MOST_FINDINGS))
    return structure or tuple(islice(_execution(program), MOST_FINDINGS))


def _execution(program: Program) -> Iterator[Finding]:
    yield from check_lifetimes(program)
    yield from check_rendezvous(program)


def require_valid(program: Program) -> None:
    """Raises ProgramError with the first finding if there is any."""
    findings = check_program(program)
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        first = findings[0]
        raise ProgramError(
            f"{first}{more}", where=first.where, hint="orchestrate's own mistake unless edited by hand"
        )
