"""Units: repeated blocks share one template, what needs no parameter is set aside, and the pieces make the whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from comms.errors import CaptureError
from partitioner.capture.forwards.step_loss import scalar_loss
from partitioner.capture.graph_units import capture_graph

SEQ = 16
MODELS = ["builtin:gpt-nano", "hf:gpt2-tiny", "hf:llama-tiny"]


def run_side(side: Any, values: dict[str, Any]) -> None:
    if side.outputs:
        results = side.graph(*(values[name] for name in side.inputs))
        values.update(zip(side.outputs, results, strict=True))


def run_graph(graph: Any, module: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(sum, count) by running constants, inputs and units one after the other."""
    values: dict[str, Any] = {**dict(module.named_parameters()), **dict(module.named_buffers()), **batch}
    run_side(graph.constants, values)
    run_side(graph.inputs, values)
    for unit in graph.units:
        names = (*unit.params, *unit.frees, *unit.activations)
        results = graph.templates[unit.template].graph(*(values[name] for name in names))
        values.update(zip(unit.outputs, results, strict=True))
    return values[graph.loss].item(), values[graph.count].item()


@pytest.mark.parametrize("name", MODELS)
def test_units_one_after_the_other_make_the_whole_model(name: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("cpu", name=name)
    batch = model.example_batch(2, SEQ)
    batch["labels"][0, :3] = -100
    graph = capture_graph(model.module, batch, tp_plan=model.tp_plan)
    total, count = run_graph(graph, model.module, batch)
    assert count == 2 * SEQ - 3
    assert total / count == pytest.approx(scalar_loss(model.module(**batch)).item(), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_repeated_blocks_share_a_template(name: str, tiny_graph: Callable[..., Any]) -> None:
    graph = tiny_graph(name=name)
    first, *blocks, last = (unit.template for unit in graph.units)
    assert blocks == [blocks[0]] * 2
    assert len({first, blocks[0], last}) == len(graph.templates) == 3


def test_the_number_of_templates_does_not_grow_with_depth(tiny_graph: Callable[..., Any]) -> None:
    graph = tiny_graph(layers=8)
    assert (len(graph.units), len(graph.templates)) == (10, 3)


def test_every_parameter_belongs_to_a_unit_and_numbers_add_up(
    tiny_graph: Callable[..., Any], tiny_model: Callable[..., Any]
) -> None:
    graph, module = tiny_graph(tied=True), tiny_model(tied=True).module
    assert (
        {p for unit in graph.units for p in unit.params}
        == set(graph.params)
        == dict(module.named_parameters()).keys()
    )
    assert graph.param_numel() == sum(p.numel() for p in module.parameters())
    homes = [unit.name for unit in graph.units if "embed.weight" in unit.params]
    assert len(homes) == 2  # the tied table is used at both ends


def test_what_depends_on_no_parameter_is_computed_outside_of_units(tiny_graph: Callable[..., Any]) -> None:
    graph = tiny_graph(name="hf:llama-tiny")
    assert set(graph.inputs.inputs) == {"input_ids", "labels"}
    assert graph.count in graph.inputs.outputs
    assert graph.constants.outputs  # rotary angles
    assert all(name in graph.buffers for name in graph.constants.inputs)
    frees = {name for unit in graph.units for name in unit.frees}
    assert frees <= {*graph.inputs.outputs, *graph.constants.outputs}


class Stack(nn.Module):
    """Five layers by hand, no container: nothing repeats by name."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.four, self.five = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.one, self.two, self.three, self.four):
            x = torch.tanh(layer(x))
        return self.five(x).square().mean()


def test_a_model_without_containers_is_one_unit_unless_more_are_needed() -> None:
    def graph(min_units: int) -> Any:
        return capture_graph(Stack(), {"x": torch.zeros(2, 4)}, min_units=min_units)

    assert len(graph(1).units) == 1
    cut = graph(2)
    assert [unit.name for unit in cut.units] == ["one", "two", "three", "four", "five"]
    assert len({unit.template for unit in cut.units[1:4]}) == 1


def test_units_name_the_module_they_come_from(tiny_graph: Callable[..., Any]) -> None:
    assert [unit.name for unit in tiny_graph().units] == ["embed", "blocks.0", "blocks.1", "norm"]


def test_frozen_blocks_do_not_share_a_template_with_trained_ones(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    model.module.blocks[0].requires_grad_(False)
    graph = capture_graph(model.module, model.example_batch(1, 8), tp_plan=model.tp_plan)
    assert graph.units[1].template != graph.units[2].template


NUMBERS = [2.0]


class UsedUp(nn.Linear):
    """Its first forward is another one than all that follow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).square().mean() * (NUMBERS.pop() if NUMBERS else 1.0)


def test_what_only_the_first_forward_finds_is_refused_though_a_second_capture_would_pass() -> None:
    with pytest.raises(CaptureError, match="another number each time"):
        capture_graph(UsedUp(2, 2), {"x": torch.ones(2, 2)})
