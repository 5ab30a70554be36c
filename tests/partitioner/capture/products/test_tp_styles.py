"""Styles: Megatron's pairing is found without a plan, and a plan's patterns decide where there is one."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from partitioner.capture.graph_units import build_graph
from partitioner.capture.products.tp_styles import COLUMN, REPLICATE, ROW, VOCAB
from partitioner.capture.samples.loss_form import whole_loss
from partitioner.capture.tracing import trace_module
from partitioner.layout.param_cuts import param_cuts

NAMES = ["builtin:gpt-nano", "hf:gpt2-tiny", "hf:llama-tiny"]


def styles_of(
    module: nn.Module, batch: dict[str, torch.Tensor], plan: Mapping[str, str] | None
) -> dict[str, str]:
    captured = trace_module(module, batch, None, plan)
    captured.tp_plan = plan or {}
    graph = build_graph(captured, whole_loss(captured), frozenset())
    units = reversed(graph.units)  # of a tied parameter, the first use counts
    return {n: s for u in units for n, s in zip(u.params, graph.templates[u.template].tp_styles, strict=True)}


@pytest.mark.parametrize("name", NAMES)
def test_the_colouring_finds_megatrons_pairing_in_blocks(name: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(name=name)
    batch = model.example_batch(2, 8)
    planned, found = styles_of(model.module, batch, model.tp_plan), styles_of(model.module, batch, {})
    blocks = [n for n in found if ".0." in n or ".1." in n]
    assert len(blocks) > 10
    assert {n: found[n] for n in blocks} == {n: planned[n] for n in blocks}


@pytest.mark.parametrize("name", NAMES)
def test_the_head_and_the_embedding_are_cut_by_vocabulary(name: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(name=name)
    captured = trace_module(model.module, model.example_batch(2, 8), None, model.tp_plan)
    graph = build_graph(captured, whole_loss(captured), frozenset())
    cuts = param_cuts(graph, 2)
    tables = [cut for n, cut in cuts.items() if any(word in n for word in ("embed", "wte", "head"))]
    assert tables and {cut.dim for cut in tables if cut is not None} == {0}


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.table = nn.Embedding(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.table(torch.arange(4))
        return self.down(torch.tanh(self.up(x))).square().mean()


BATCH = {"x": torch.zeros(2, 4, 4)}


def test_a_column_weight_is_followed_by_a_row_weight_and_its_bias_stays_whole() -> None:
    found = styles_of(TwoLayers(), BATCH, {})
    assert (found["up.weight"], found["up.bias"]) == (COLUMN, COLUMN)
    assert (found["down.weight"], found["down.bias"]) == (ROW, REPLICATE)


def test_a_table_that_is_not_indexed_by_the_batch_stays_whole() -> None:
    assert styles_of(TwoLayers(), BATCH, {})["table.weight"] == REPLICATE


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({"up": "replicate"}, (REPLICATE, COLUMN)),
        ({"up": "rowwise", "down": "rowwise"}, (ROW, ROW)),
        ({"*": "colwise"}, (COLUMN, COLUMN)),
        ({"d*": "colwise_gather_output"}, (COLUMN, COLUMN)),
        ({"up": "something else"}, (COLUMN, ROW)),
        ({"other.up": "rowwise"}, (COLUMN, ROW)),
        ({"up": "vocab"}, (VOCAB, COLUMN)),
    ],
    ids=str,
)
def test_patterns_of_the_plan_decide(plan: Mapping[str, str], expected: tuple[str, str]) -> None:
    found = styles_of(TwoLayers(), BATCH, plan)
    assert (found["up.weight"], found["down.weight"]) == expected


def test_a_star_matches_one_path_component_only() -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    captured = trace_module(
        module, {"input": torch.zeros(2, 4)}, lambda o, **batch: o.mean(), {"0.*": "rowwise", "*": "colwise"}
    )
    graph = build_graph(captured, whole_loss(captured), frozenset())
    assert {s for t in graph.templates for s in t.tp_styles} == {ROW, REPLICATE}
