"""Recompute: an interpreter of captured graphs that runs what was checkpointed under torch's own checkpoint.

Autograd then saves what such a part reads, and runs the part again when its backward begins: a trace of forward and
backward holds the second run where it takes place, nested parts and chosen savings included. Parts are the operations
of one `Region` in one graph; where a graph was cut inside a region, each piece is a part by itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
from torch.fx import Node
from torch.utils import checkpoint

from partitioner.capture.captured_graph import reads_of
from partitioner.capture.forwards.checkpoints import Region, regions_of
from partitioner.capture.pure_graph import UnderModes

Step: TypeAlias = "Node | Part"


@dataclass(frozen=True, eq=False)
class Part:
    """Operations in a row that are computed again."""

    region: Region
    steps: tuple[Step, ...]

    @property
    def nodes(self) -> list[Node]:
        """All of them, nested ones included."""
        return [n for s in self.steps for n in (s.nodes if isinstance(s, Part) else (s,))]


def parts(nodes: Sequence[Node], depth: int = 0) -> tuple[Step, ...]:
    """The nodes in order, with what lies between the first and the last one of a region as one step."""
    last = {regions_of(n)[depth]: place for place, n in enumerate(nodes) if len(regions_of(n)) > depth}
    steps: list[Step] = []
    place = 0
    while place < len(nodes):
        regions = regions_of(nodes[place])
        if len(regions) <= depth:
            steps.append(nodes[place])
            place += 1
            continue
        end = last[regions[depth]] + 1
        steps.append(Part(regions[depth], parts(nodes[place:end], depth + 1)))
        place = end
    return tuple(steps)


class Recomputing(UnderModes):
    """Runs a graph's checkpointed parts by `torch.utils.checkpoint`; all values stay, as a later part may read them."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.nodes = list(module.graph.nodes)

    def run(self, *args: Any, **_: Any) -> Any:
        """The graph's outputs."""
        self.env, self.args_iter = {}, iter(args)
        self._run(parts(self.nodes[:-1]))
        return self.run_node(self.nodes[-1])

    def _run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if isinstance(step, Node):
                self.env[step] = self.run_node(step)
            else:
                self._run_part(step)

    def _run_part(self, part: Part) -> None:
        inside = set(nodes := part.nodes)
        reads, made = reads_of(nodes), [n for n in nodes if any(u not in inside for u in n.users)]

        def function(*values: Any) -> tuple[Any, ...]:
            with self._inside(dict(zip(reads, values, strict=True))):
                self._run(part.steps)
                return tuple(self.env[n] for n in made)

        results = checkpoint.checkpoint(
            function, *(self.env[n] for n in reads), use_reentrant=False, preserve_rng_state=False,
            context_fn=part.region.context_fn,
        )  # fmt: skip
        self.env |= zip(made, results, strict=True)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operator's result; random numbers do not wait for the value that they are like."""
        if target is torch.ops.orchestrate.keyed_uniform.default:
            args = (*args[:2], None, *args[3:])
        return super().call_function(target, args, kwargs)

    @contextmanager
    def _inside(self, values: Mapping[Node, Any]) -> Iterator[None]:
        """Nothing but `values` is known, as on a second run; it ends early once autograd has what it saved before."""
        before, self.env = self.env, dict(values)
        try:
            yield
        finally:
            self.env = before


@contextmanager
def as_when_run() -> Iterator[None]:
    """Chosen savings count inside the block as they do when no trace is made (else they are left to a compiler)."""
    with patch.object(checkpoint, "_is_compiling", lambda *_: False):
        yield
