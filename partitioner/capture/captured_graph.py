"""The captured model: one graph of global tensors, cut into units.

A *unit* is a contiguous slice of the model's forward: one of a row of repeated blocks, or the glue between
them. Units with the same structure share a *template* (an `fx.Graph`), so a 96-layer model is traced once per
distinct block. Values that depend on no parameter are not part of any unit: the *constants* graph is evaluated
once, the *inputs* graph once per microbatch in every stage that needs it (labels shifted, masks built).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from partitioner.program.program import TensorSpec


@dataclass(frozen=True, slots=True)
class Unit:
    """One call of a template: global value names in, global value names out.

    `params`, `frees` (values of the constants or inputs graph) and `activations` follow the template's
    placeholders, in that order.
    """

    name: str
    template: int
    params: tuple[str, ...]
    frees: tuple[str, ...]
    activations: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Template:
    """A unit's forward as a graph of pre-dispatch ATen ops on global shapes."""

    graph: torch.fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    num_params: int
    num_frees: int
    outputs: tuple[TensorSpec, ...]
    flops: int
    tp_styles: tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """A graph without parameters: its outputs by global value name, and the names of what it reads."""

    graph: torch.fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """A whole model, captured for one microbatch of one data-parallel replica."""

    units: tuple[Unit, ...]
    templates: tuple[Template, ...]
    constants: Side
    inputs: Side
    specs: Mapping[str, TensorSpec]
    params: tuple[str, ...]
    frozen: frozenset[str]
    batch: tuple[str, ...]
    buffers: tuple[str, ...]
    loss: str
    count: str
    loss_rule: str

    def param_numel(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(self.specs[name].numel for name in self.params)


def operand(node: Node, index: int) -> Node:
    """Argument `index` of a node where the operator's schema says that it is a tensor."""
    found = node.args[index]
    assert isinstance(found, Node), f"argument {index} of {node} is {found}"
    return found
