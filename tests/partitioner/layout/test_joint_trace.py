"""Joint tracing: local graphs have Megatron's communication and shapes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from partitioner.capture.graph_units import capture_graph
from partitioner.layout.joint_trace import Joint, trace_joint
from partitioner.layout.param_cuts import param_cuts

EMBED, BLOCK, HEAD = 0, 1, 3  # units of the tiny GPT


def trace_unit(graph: Any, index: int, tp: int) -> Joint:
    unit = graph.units[index]
    cuts = param_cuts(graph, tp) if tp > 1 else dict.fromkeys(unit.params)
    return trace_joint(graph.templates[unit.template], [cuts[name] for name in unit.params], tp)


def text_of(joint: Joint) -> str:
    return "\n".join(node.format_node() or "" for node in joint.graph.nodes)


def reductions(joint: Joint) -> list[str]:
    return [str(n.args[1]) for n in joint.graph.nodes if "_c10d_functional.all_reduce" in str(n.target)]


def collectives(joint: Joint) -> list[str]:
    return [
        n.name
        for n in joint.graph.nodes
        if "_c10d_functional" in str(n.target) and "wait" not in str(n.target)
    ]


def shapes(joint: Joint) -> list[tuple[int, ...]]:
    return [tuple(n.meta["val"].shape) for n in joint.graph.nodes if n.op == "placeholder"]


@pytest.fixture(scope="module")
def joints(tiny_graph: Callable[..., Any]) -> dict[int, Joint]:
    return {index: trace_unit(tiny_graph(), index, 2) for index in (EMBED, BLOCK, HEAD)}


def test_a_block_has_two_all_reduces_forward_and_two_backward(joints: dict[int, Joint]) -> None:
    joint = joints[BLOCK]
    assert reductions(joint) == ["sum"] * 4
    assert len(collectives(joint)) == 4
    results = next(iter(reversed(joint.graph.nodes))).args[0]
    seen, stack = set(), list(results[: joint.num_outputs])
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    assert sum("all_reduce" in str(n.target) for n in seen) == 2


def test_the_embedding_is_summed_and_the_loss_needs_three_small_reductions(joints: dict[int, Joint]) -> None:
    assert reductions(joints[EMBED]) == ["sum"]
    head = joints[HEAD]
    assert sorted(reductions(head)) == [
        "max",
        "sum",
        "sum",
    ]  # two for the loss, one for the gradient of its input
    assert len(collectives(head)) == 3
    sizes = [n.args[0].meta["val"].numel() for n in head.graph.nodes if "all_reduce" in str(n.target)]
    tokens, width = 2 * 16, 32
    assert sorted(sizes) == [tokens, 2 * tokens, tokens * width]  # never tokens * vocabulary


def test_local_parameters_are_halves_along_the_cut_dim(
    joints: dict[int, Joint], tiny_graph: Callable[..., Any]
) -> None:
    graph = tiny_graph()
    for index, joint in joints.items():
        cuts = param_cuts(graph, 2)
        for local, name in zip(shapes(joint), graph.units[index].params, strict=False):
            cut, whole = cuts[name], graph.specs[name].shape
            assert local == tuple(n // 2 if cut and i == cut.dim else n for i, n in enumerate(whole))


def test_gradients_have_the_shapes_of_what_they_are_gradients_of(joints: dict[int, Joint]) -> None:
    for joint in joints.values():
        placeholders = [n for n in joint.graph.nodes if n.op == "placeholder"]
        results = next(iter(reversed(joint.graph.nodes))).args[0]
        assert len(results) == joint.num_outputs + len(joint.wanted)
        for index, grad in zip(joint.wanted, results[joint.num_outputs :], strict=True):
            assert grad.meta["val"].shape == placeholders[index].meta["val"].shape


def test_each_chip_does_its_share_of_the_matmuls(
    tiny_graph: Callable[..., Any], joints: dict[int, Joint]
) -> None:
    def matmul_flops(joint: Joint) -> int:
        nodes = [n for n in joint.graph.nodes if str(n.target) in ("aten.mm.default", "aten.addmm.default")]
        return sum(2 * n.meta["val"].numel() * n.args[-2].meta["val"].shape[-1] for n in nodes)

    for index in (BLOCK, HEAD):
        assert 2 * matmul_flops(joints[index]) == matmul_flops(trace_unit(tiny_graph(), index, 1))


def test_the_first_unit_has_no_gradient_for_its_input(
    joints: dict[int, Joint], tiny_graph: Callable[..., Any]
) -> None:
    unit = tiny_graph().units[EMBED]
    assert joints[EMBED].wanted == tuple(range(len(unit.params)))
    assert joints[BLOCK].wanted[-1] == len(tiny_graph().units[BLOCK].params)


def test_frozen_parameters_get_no_gradient(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    biases = frozenset(name for name, _ in model.module.named_parameters() if name.endswith("bias"))
    graph = capture_graph(model.module, model.example_batch(2, 16), tp_plan=model.tp_plan, frozen=biases)
    unit, joint = graph.units[BLOCK], trace_unit(graph, BLOCK, 1)
    trained = [i for i, name in enumerate(unit.params) if not name.endswith("bias")]
    assert joint.wanted == (*trained, len(unit.params))


def test_nothing_is_differentiated_before_the_first_parameter_that_is_trained(
    tiny_model: Callable[..., Any],
) -> None:
    model = tiny_model()
    early = frozenset(n for n, _ in model.module.named_parameters() if not n.startswith(("norm", "head")))
    graph = capture_graph(model.module, model.example_batch(2, 16), tp_plan=model.tp_plan, frozen=early)
    assert [trace_unit(graph, index, 1).wanted for index in (EMBED, BLOCK)] == [(), ()]
    head = graph.units[HEAD]
    assert trace_unit(graph, HEAD, 1).wanted == tuple(range(len(head.params)))


def test_heads_that_do_not_divide_are_gathered_before_attention(tiny_graph: Callable[..., Any]) -> None:
    joint = trace_unit(tiny_graph(heads=1), BLOCK, 2)
    (kernel, *_) = [n for n in joint.graph.nodes if "flash_attention_for_cpu" in str(n.target)]
    assert kernel.args[0].meta["val"].shape == torch.Size([2, 1, 16, 32])


def test_attention_on_half_of_the_heads_is_traced_locally(joints: dict[int, Joint]) -> None:
    kernels = [n for n in joints[BLOCK].graph.nodes if "flash_attention_for_cpu" in str(n.target)]
    assert [n.args[0].meta["val"].shape for n in kernels[:1]] == [torch.Size([2, 2, 16, 8])]
