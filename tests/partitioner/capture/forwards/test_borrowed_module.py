"""A borrowed module: bit for bit what it was after a capture, and a forward that remembers is found out."""

import copy
from collections import OrderedDict, deque
from collections.abc import Callable
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import nn

from comms.errors import CaptureError
from partitioner.capture.forwards.borrowed_module import borrowed
from partitioner.capture.tracing import trace_module

X = torch.ones(2, 4)
Forward = Callable[["Crowded", torch.Tensor], torch.Tensor]


class Crowded(nn.Module):
    """Attributes of every kind, a module under two names, a tied weight, a buffer, and any forward."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.script = forward
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.alias = self.first
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scale", torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.calls, self.last = 0, None
        self.numbers, self.table, self.names = [1, [2]], {"a": {"b": 3}}, {"x", "y"}
        self.recent: deque[int] = deque([1, 2], maxlen=3)
        self.ordered = OrderedDict(z=1, a=2)
        self.untracked = torch.arange(3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.script(self, x)


def plain(m: Crowded, x: torch.Tensor) -> torch.Tensor:
    return (m.second(m.norm(m.alias(x))) * m.scale + m.frozen).square().mean()


def storing(m: Crowded, x: torch.Tensor) -> torch.Tensor:
    """Changes everything that can be changed, and depends on none of it."""
    m.calls += 1
    m.last = m.first(x)
    m.new = "attribute"
    m.numbers.append(m.last)
    m.numbers[1].clear()
    m.table["a"]["b"] = m.calls
    m.table["more"] = m.table
    m.names.add("z")
    m.recent.append(9)
    m.ordered.move_to_end("z")
    m.second.extra = [x]
    vars(m).pop("untracked", None)
    m.scale = m.scale * 1.5
    m.norm.momentum = 0.5
    return plain(m, x)


def failing(m: Crowded, x: torch.Tensor) -> torch.Tensor:
    storing(m, x)
    m.first.train()
    raise RuntimeError("after all these changes")


def image(module: nn.Module) -> list[object]:
    """Everything a module holds: which objects, and what is in them."""
    found: list[object] = []
    for path, child in module.named_modules():
        found.append((path, id(child), list(child.__dict__)))
        for name, value in child.__dict__.items():  # a set has no order
            found.append((name, id(value), str(sorted(value) if isinstance(value, set) else value)))
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        found.append((name, id(value), value.data_ptr(), value._version, value.grad, value.requires_grad))
        found.append(value.detach().clone().view(-1).tolist())
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("forward", [plain, storing])
def test_a_capture_leaves_the_module_as_it_was(forward: Forward, training: bool) -> None:
    module = Crowded(forward).train(training)
    before = image(module)
    trace_module(module, {"x": X}, None)
    assert image(module) == before


def test_an_exception_leaves_the_module_as_it_was() -> None:
    module = Crowded(failing)
    before = image(module)
    with pytest.raises(CaptureError, match="after all these changes"):
        trace_module(module, {"x": X}, None)
    assert image(module) == before


def test_gradients_of_the_user_stay_and_none_are_left_behind() -> None:
    module = Crowded(storing)
    trace_module(module, {"x": X}, None)
    assert all(p.grad is None for p in module.parameters())
    given = torch.full((4, 4), 7.0)
    module.first.weight.grad = given
    trace_module(module, {"x": X}, None)
    assert module.first.weight.grad is given and bool((given == 7.0).all())


def test_no_fake_tensor_is_left_behind() -> None:
    module = Crowded(storing)
    trace_module(module, {"x": X}, None)
    assert copy.deepcopy(module).state_dict().keys() == module.state_dict().keys()
    assert torch.isfinite(module(X))
    assert type(module.last) is torch.Tensor


def test_storing_things_changes_nothing_that_is_captured() -> None:
    def scaled(m: Crowded, x: torch.Tensor) -> torch.Tensor:
        m.scale = m.scale * 1.5
        m.norm.momentum = 0.5
        return plain(m, x)

    targets = [
        [str(n.target) for n in trace_module(Crowded(f), {"x": X}, None).graph_module.graph.nodes]
        for f in (scaled, storing)
    ]
    assert targets[0] == targets[1]


def by_a_counter(m: Crowded, x: torch.Tensor) -> torch.Tensor:
    m.calls += 1
    return m.first(x).mean() * m.calls


def by_a_flag(m: Crowded, x: torch.Tensor) -> torch.Tensor:
    m.last = m.last is None
    return m.first(x).mean() if m.last else m.second(x).mean()


def by_a_list(m: Crowded, x: torch.Tensor) -> torch.Tensor:
    m.numbers.append(0)
    return sum((m.first(x).mean() for _ in m.numbers), torch.zeros(()))


def by_a_dict_within(m: Crowded, x: torch.Tensor) -> torch.Tensor:
    m.table["a"]["b"] += 1
    return m.first(x).mean() * m.table["a"]["b"]


def by_an_attribute_of_a_child(m: Crowded, x: torch.Tensor) -> torch.Tensor:
    m.second.rounds = getattr(m.second, "rounds", 0) + 1
    return m.first(x).mean() * m.second.rounds


MEMORIES = [
    (by_a_counter, "calls"), (by_a_flag, "last"), (by_a_list, "numbers"), (by_a_dict_within, "table"),
    (by_an_attribute_of_a_child, "second.rounds"),
]  # fmt: skip


@pytest.mark.parametrize(("forward", "name"), MEMORIES)
def test_a_forward_that_depends_on_what_it_changes_is_refused_by_name(forward: Forward, name: str) -> None:
    module = Crowded(forward)
    before = image(module)
    with pytest.raises(CaptureError, match=f"depends on {name}, which it changes itself") as caught:
        trace_module(module, {"x": X}, None)
    assert "buffer" in caught.value.hint
    assert image(module) == before


def test_what_a_forward_made_before_it_may_use() -> None:
    """A cache that is filled by the first call and read in the same: the same operations every time."""

    def caching(m: Crowded, x: torch.Tensor) -> torch.Tensor:
        m.last = m.first(x)
        return m.last.square().mean() + m.second(m.last).mean()

    assert trace_module(Crowded(caching), {"x": X}, None).calls


def test_a_cache_from_another_call_is_a_memory() -> None:
    def keeping(m: Crowded, x: torch.Tensor) -> torch.Tensor:
        if m.last is None:
            m.last = m.first(x)
        return m.last.mean()

    with pytest.raises(CaptureError, match="depends on last"):
        trace_module(Crowded(keeping), {"x": X}, None)


def test_every_name_of_a_shared_parameter_is_replaced_and_given_back() -> None:
    module = Crowded(plain)
    weight, stand_in = module.first.weight, nn.Parameter(torch.zeros(4, 4))
    others = {id(v): v for v in (*module.parameters(), *module.buffers())}
    with borrowed(module) as lent:
        lent.replace({**others, id(weight): stand_in})
        assert module.first.weight is module.alias.weight is module.second.weight is stand_in
        assert lent.changed() == []
    assert module.first.weight is module.alias.weight is module.second.weight is weight


def test_changes_are_told_by_name() -> None:
    module = Crowded(plain)
    with borrowed(module) as lent:
        module.calls, module.second.more = 5, 1
        module.recent.append(3)
        module.ordered.move_to_end("z")
        assert set(lent.changed()) == {"calls", "second.more", "recent", "ordered"}
    assert lent.changed() == []


def test_containers_keyed_by_tensors_are_held_as_they_are() -> None:
    module = nn.Linear(4, 4)
    module.names = {p: n for n, p in module.named_parameters()}
    module.weak = WeakKeyDictionary({module: 1})
    module.held = [torch.optim.AdamW(module.parameters())]
    module(X).sum().backward()
    module.held[0].step()
    trace_module(module, {"input": X}, lambda output: output.sum())
    assert set(module.names.values()) == {"weight", "bias"} and dict(module.weak) == {module: 1}


def test_a_forward_that_changes_what_is_keyed_by_tensors_is_found() -> None:
    def marking(m: Crowded, x: torch.Tensor) -> torch.Tensor:
        m.table[m.first.weight] = len(m.table)
        return m.first(x).sum() * len(m.table)

    module = Crowded(marking)
    with pytest.raises(CaptureError, match="table"):
        trace_module(module, {"x": X}, None)
    assert list(module.table) == ["a"]


def test_a_table_that_is_filled_anew_with_equal_keys_is_the_same() -> None:
    def refilling(m: Crowded, x: torch.Tensor) -> torch.Tensor:
        held = m.table["a"]
        m.table.clear()
        m.table["".join(["a"])] = held
        m.shapes.clear()
        m.shapes[tuple(x.shape)] = held
        return m.first(x).sum()

    module = Crowded(refilling)
    module.shapes = {(2, 4): module.table["a"]}
    trace_module(module, {"x": X}, None)
