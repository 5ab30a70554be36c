"""Two traces side by side: copies that torch leaves out for one sample are no difference, other operations are."""

from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from comms.errors import CaptureError
from partitioner.capture.captured_graph import op_name
from partitioner.capture.samples.two_traces import paired


def traces(function: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.fx.Graph]:
    return [make_fx(function, pre_dispatch=True)(torch.ones(n, 3, 4)).graph for n in (1, 4)]


@pytest.mark.parametrize(
    "function",
    [lambda x: x[:, :-1].contiguous().view(-1, 4).sin(), lambda x: x[:, :-1].clone().view(-1, 4).sin(),
     lambda x: x.transpose(0, 1).reshape(-1, 4).sin(), lambda x: x.permute(1, 0, 2).contiguous().view(3, -1).sin()],
    ids=["contiguous", "clone", "reshape", "permuted"],
)  # fmt: skip
def test_every_operation_of_a_part_has_its_own_of_the_whole(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    part, whole = traces(function)
    pairs = paired(part, whole)
    assert [mine for mine, _ in pairs] == list(part.nodes)
    kinds = [(op_name(mine.target), op_name(other.target)) for mine, other in pairs]
    assert ("sin", "sin") in kinds and pairs[-1][1].op == "output"
    for mine, other in pairs:
        if mine.op == "call_function":
            sizes = mine.meta["val"].numel(), other.meta["val"].numel()
            assert sizes[1] == 4 * sizes[0]


@pytest.mark.parametrize(
    "function",
    [lambda x: x.sin() if len(x) == 1 else x.cos(), lambda x: x.sin() if len(x) == 1 else x.sin().exp()],
    ids=["another", "one more"],
)
def test_other_operations_are_a_difference(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(
        CaptureError, match=r"computed differently: (sin|output) where the whole batch has (cos|exp)"
    ):
        paired(*traces(function))
