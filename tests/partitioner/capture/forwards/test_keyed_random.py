"""Randomness by keys: parts of a batch draw what the whole would, whatever the plan; distributions are torch's."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from comms.errors import CaptureError
from orchestrator.runs.data import step_key
from orchestrator.verbs.distribute import distribute
from partitioner.capture.forwards.keyed_random import keyed_random
from partitioner.layout.parallel_plan import Plan

PLANS = [Plan(), Plan(dp=2), Plan(microbatches=2), Plan(pp=2, microbatches=2)]
BOTH_WAYS = [Plan(dp=2, microbatches=2, zero=1), Plan(tp=2)]
THREE = torch.tensor([[2.0, 5.0, 3.0]]).expand(20_000, 3)
NUMBERS = torch.full((200, 100), 2.0, dtype=torch.float64)
SEED = 5


def number(value: int) -> torch.Tensor:
    return torch.tensor(value)


def drawn(function: Callable[[], torch.Tensor], key: int = 0, first: int = 0) -> torch.Tensor:
    with keyed_random(number(key), number(first)):
        return function()


def written(draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    """What stands where a function was told to write."""
    place = torch.zeros(200, 100)
    draw(200, 100, out=place)
    return place


def written_over(drop: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What a dropout in place leaves of its input."""
    value = NUMBERS.clone()
    drop(value)
    return value


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(-(2**63), 2**63 - 1),
)
def test_numbers_of_parts_side_by_side_are_those_of_the_whole(
    outer: int, parts: int, samples: int, weight: int, key: int
) -> None:
    def uniform(shape: list[int], first: int, *layout: int) -> torch.Tensor:
        found: torch.Tensor = torch.ops.orchestrate.keyed_uniform(
            number(key), number(first), None, 3, shape, *layout
        )
        return found

    whole = uniform([outer, parts * samples, weight], 0, 0, 0, 0)
    cut = [
        uniform([outer, samples, weight], part * samples, weight, samples, parts * samples)
        for part in range(parts)
    ]
    assert torch.equal(torch.cat(cut, 1), whole)
    assert bool((whole >= 0).all()) and bool((whole < 1).all())


# function, mean, variance and whether entries are independent
KINDS: dict[str, tuple[Callable[[], torch.Tensor], float, float]] = {
    "rand": (lambda: torch.rand(200, 100), 1 / 2, 1 / 12),
    "rand of a tuple": (lambda: torch.rand((200, 100), dtype=torch.float64), 1 / 2, 1 / 12),
    "randn": (lambda: torch.randn(200, 100), 0, 1),
    "rand_like": (lambda: torch.rand_like(NUMBERS), 1 / 2, 1 / 12),
    "randn_like": (lambda: torch.randn_like(NUMBERS), 0, 1),
    "rand of a size": (lambda: torch.rand(size=NUMBERS.shape), 1 / 2, 1 / 12),
    "randn written": (lambda: written(torch.randn), 0, 1),
    "rand written": (lambda: written(torch.rand), 1 / 2, 1 / 12),
    "real part of randn": (lambda: torch.randn(200, 100, dtype=torch.complex64).real, 0, 1 / 2),
    "other part of randn": (lambda: torch.randn(200, 100, dtype=torch.complex64).imag, 0, 1 / 2),
    "other part of rand": (lambda: torch.rand(200, 100, dtype=torch.complex64).imag, 1 / 2, 1 / 12),
    "other part of normal_": (lambda: torch.empty(200, 100, dtype=torch.complex64).normal_(1, 2).imag, 0, 2),
    "uniform_ to": (lambda: torch.empty(200, 100).uniform_(-1, to=3), 1, 16 / 12),
    "exponential_ lambd": (lambda: torch.empty(200, 100).exponential_(lambd=2.0), 1 / 2, 1 / 4),
    "randint of a size": (lambda: torch.randint(2, 12, size=(200, 100)).double(), 6.5, (10**2 - 1) / 12),
    "randint by name": (
        lambda: torch.randint(high=12, low=2, size=(200, 100)).double(),
        6.5,
        (10**2 - 1) / 12,
    ),
    "randint_like by name": (lambda: torch.randint_like(NUMBERS, high=10), 4.5, (10**2 - 1) / 12),
    "random_ to": (lambda: torch.empty(200, 100).random_(2, to=12), 6.5, (10**2 - 1) / 12),
    "normal of two shapes": (lambda: torch.normal(NUMBERS[:, :1], NUMBERS[:1]), 2, 4),
    "dropout's input": (lambda: written_over(lambda x: F.dropout(x, 0.5, inplace=True)), 2, 4),
    "dropout2d's input": (
        lambda: written_over(lambda x: F.dropout2d(x[..., None, None], 0.5, True, True)),
        2,
        4,
    ),
    "randint": (lambda: torch.randint(2, 12, (200, 100)).double(), 6.5, (10**2 - 1) / 12),
    "randint below": (lambda: torch.randint(10, (200, 100)).double(), 4.5, (10**2 - 1) / 12),
    "randint_like": (lambda: torch.randint_like(NUMBERS, 10), 4.5, (10**2 - 1) / 12),
    "uniform_": (lambda: torch.empty(200, 100).uniform_(-1, 3), 1, 16 / 12),
    "normal_": (lambda: torch.empty(200, 100).normal_(3, 2), 3, 4),
    "exponential_": (lambda: torch.empty(200, 100).exponential_(2.0), 1 / 2, 1 / 4),
    "bernoulli": (lambda: torch.bernoulli(torch.full((200, 100), 0.3)), 0.3, 0.21),
    "bernoulli_": (lambda: torch.empty(200, 100).bernoulli_(0.3), 0.3, 0.21),
    "dropout": (lambda: F.dropout(NUMBERS, 0.2), 2, 4 / 0.8 - 4),
    "dropout of a layer": (lambda: nn.Dropout(0.75)(NUMBERS), 2, 4 / 0.25 - 4),
    "dropout in place": (lambda: F.dropout(NUMBERS.clone(), 0.5, inplace=True), 2, 4),
    "dropout2d": (lambda: F.dropout2d(NUMBERS[:, :, None, None], 0.5), 2, 4),
    "log_normal_": (
        lambda: torch.empty(200, 100).log_normal_(0, 0.5),
        math.exp(1 / 8),
        math.exp(1 / 2) - math.exp(1 / 4),
    ),
    "geometric_": (lambda: torch.empty(200, 100).geometric_(0.4), 2.5, 0.6 / 0.16),
    "random_": (lambda: torch.empty(200, 100).random_(2, 12), 6.5, (10**2 - 1) / 12),
    "normal around": (lambda: torch.normal(NUMBERS, 3.0), 2, 9),
    "normal of a size": (lambda: torch.normal(1.0, 2.0, (200, 100)), 1, 4),
    "one of three": (lambda: torch.multinomial(THREE, 1).double(), 1.1, 1.7 - 1.1**2),
    "some of three": (
        lambda: torch.multinomial(THREE[:200], 100, replacement=True).double(),
        1.1,
        1.7 - 1.1**2,
    ),
    "two of three": (lambda: torch.multinomial(THREE[:, 1:], 2).sum(1) + torch.rand(20_000), 1.5, 1 / 12),
    "Laplace": (lambda: torch.distributions.Laplace(NUMBERS, 1.0).rsample(), 2, 2),
    "rrelu": (lambda: -F.rrelu(-NUMBERS, 0.2, 0.4, training=True), 0.6, 4 * 0.04 / 12),
}


@pytest.mark.parametrize("kind", KINDS)
def test_mean_and_variance_are_the_distributions_own(kind: str, one_thread: None) -> None:
    function, mean, variance = KINDS[kind]
    found = drawn(function).double()
    error = math.sqrt(variance / found.numel())
    assert found.mean().item() == pytest.approx(mean, abs=4 * error)
    assert found.var().item() == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_follow_from_the_key_and_leave_torchs_generator_alone(kind: str, one_thread: None) -> None:
    function = KINDS[kind][0]
    state = torch.get_rng_state()
    first = drawn(function)
    torch.manual_seed(1)
    assert torch.equal(drawn(function), first)
    torch.set_rng_state(state)
    assert not torch.equal(drawn(function, key=1), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_call_draws_anew_and_alike_in_every_trace() -> None:
    def three() -> torch.Tensor:
        return torch.stack([torch.rand(50), torch.rand(50), torch.rand_like(torch.ones(50))])

    rows = drawn(three)
    assert len({tuple(row.tolist()) for row in rows}) == 3
    assert abs(torch.corrcoef(drawn(lambda: torch.rand(2, 5000)))[0, 1].item()) < 0.05


def test_seeds_and_steps_give_other_numbers() -> None:
    found = {
        tuple(drawn(lambda: torch.rand(5), key=step_key(seed, step)).tolist())
        for seed in range(10) for step in range(10)
    }  # fmt: skip
    assert len(found) == 100


@pytest.mark.parametrize(
    ("layer", "zero"),
    [(nn.AlphaDropout(0.4), False), (nn.FeatureAlphaDropout(0.4), False), (nn.Dropout1d(0.4), True)],
)
def test_alpha_dropout_keeps_mean_and_variance_and_channels_go_together(
    layer: nn.Module, zero: bool, one_thread: None
) -> None:
    x = torch.randn(200, 40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = drawn(lambda: layer(x))
    assert found.mean().item() == pytest.approx(0, abs=0.05)
    assert found.var().item() == pytest.approx(1 / 0.6 if zero else 1, abs=0.08)
    dropped = found[..., :1] == found[..., 1:2]
    share = dropped.double().mean().item()
    by_channel = not isinstance(layer, nn.AlphaDropout) or isinstance(layer, nn.FeatureAlphaDropout)
    assert share == pytest.approx(0.4 if by_channel else 0.16, abs=0.02)


def test_a_permutation_holds_every_number_once() -> None:
    order = drawn(lambda: torch.randperm(50))
    assert sorted(order.tolist()) == list(range(50)) != order.tolist()


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropping_nothing_and_everything(p: float) -> None:
    for layer in (nn.Dropout(p), nn.Dropout2d(p), nn.FeatureAlphaDropout(p)):
        found = drawn(lambda layer=layer: layer(torch.ones(3, 4, 2, 2)))
        assert torch.isfinite(found).all()
        assert bool((found == 1).all()) is (p == 0.0)
    assert bool((drawn(lambda: F.dropout(torch.ones(9), 1.0)) == 0).all())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_attention_without_anything_dropped_is_torchs(causal: bool, mask: str | None) -> None:
    if causal and mask:
        return
    q, k, v = torch.randn(
        3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).unbind()
    seen = None if mask is None else torch.rand(6, 6, generator=torch.Generator().manual_seed(1)) > 0.3
    seen = seen.double() if mask == "float" else seen
    given = {"attn_mask": seen, "is_causal": causal, "scale": 0.4}
    expected = F.scaled_dot_product_attention(q, k, v, **given)
    found = drawn(lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=1e-12, **given))
    torch.testing.assert_close(found, expected)
    grouped = drawn(
        lambda: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], None, 1e-12, enable_gqa=True)
    )
    torch.testing.assert_close(
        grouped, F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
    )


class Noisy(nn.Module):
    """Two layers with something random between them."""

    def __init__(self, between: Callable[..., torch.Tensor] | nn.Module) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 8).double(), nn.Linear(8, 2).double()
        self.between = between

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.last(self.between(self.first(x))), y)


def attending(x: torch.Tensor) -> torch.Tensor:
    heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
    found = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.3, is_causal=True)
    return found.transpose(1, 2).flatten(2)


def time_major(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x.transpose(0, 1).contiguous(), 0.4).transpose(0, 1)


def flattened(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x.flatten(0, 1).relu(), 0.4).view_as(x)


def once_for_all(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rand(8, dtype=x.dtype) + torch.randn(3, 1, dtype=x.dtype)


def by_shape(x: torch.Tensor) -> torch.Tensor:
    return x + torch.randn(x.shape, dtype=x.dtype) * torch.rand(x.shape[0], 1, 1, dtype=x.dtype)


def stochastic_depth(x: torch.Tensor) -> torch.Tensor:
    keep = torch.empty(x.shape[0], 1, 1, dtype=x.dtype).bernoulli_(0.7)
    return x + x.tanh() * keep / 0.7


LAYERS: dict[str, Any] = {
    "dropout": nn.Dropout(0.3), "dropout in place": nn.Dropout(0.3, inplace=True), "dropout1d": nn.Dropout1d(0.5),
    "alpha": nn.AlphaDropout(0.3), "feature alpha": nn.FeatureAlphaDropout(0.3), "rrelu": nn.RReLU(),
    "rand_like": lambda x: x * torch.rand_like(x), "randn_like": lambda x: x + torch.randn_like(x),
    "gumbel": lambda x: F.gumbel_softmax(x, 0.7), "attention": attending, "time-major": time_major,
    "flattened": flattened, "once for all": once_for_all, "by shape": by_shape, "stochastic depth": stochastic_depth,
    "two": nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.2)),
    "bernoulli": lambda x: torch.bernoulli(x.detach().sigmoid()) * x,
}  # fmt: skip


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(8, 3, 4, generator=generator, dtype=torch.float64),
            "y": torch.randn(8, 3, 2, generator=generator, dtype=torch.float64)}  # fmt: skip


def losses_of_one_chip(layer: Any, steps: int) -> list[float]:
    module = Noisy(layer)
    optimizer, losses = torch.optim.SGD(module.parameters(), 0.1), []
    for step in range(steps):
        optimizer.zero_grad()
        inputs = batch(step)
        with keyed_random(number(step_key(SEED, step)), number(0)):
            loss = module(**inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("layer", "plan"),
    [*((layer, plan) for layer in LAYERS for plan in BOTH_WAYS), *(("dropout", plan) for plan in PLANS)],
    ids=str,
)
def test_every_plan_draws_what_one_chip_draws(layer: str, plan: Plan, laptop: Any, one_thread: None) -> None:
    module = Noisy(LAYERS[layer])
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    step = distribute(module, optimizer, laptop, plan=plan, chips=plan.num_chips, seed=SEED)
    found = [step(batch(index)) for index in range(2)]
    assert found == pytest.approx(losses_of_one_chip(LAYERS[layer], 2), rel=1e-9)


def test_a_resumed_run_draws_on(laptop: Any, one_thread: None) -> None:
    module = Noisy(nn.Dropout(0.5))
    frozen = torch.optim.SGD(module.parameters(), 0.0)
    step = distribute(module, frozen, laptop, plan=Plan(dp=2), chips=2, seed=SEED)
    found = [step(batch(0)) for _ in range(3)]
    assert len(set(found)) == 3
    step.sync()
    again = distribute(module, frozen, laptop, plan=Plan(dp=2), chips=2, seed=SEED)
    again.steps = 2
    assert again(batch(0)) == found[2]
    again.sync()
    other = distribute(module, frozen, laptop, plan=Plan(dp=2), chips=2, seed=SEED + 1)
    assert other(batch(0)) != found[0]


def gamma(x: torch.Tensor) -> torch.Tensor:
    return x * torch.distributions.Gamma(x.detach().exp(), 1.0).sample()


def generated(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rand(8, generator=torch.Generator())


class TwoLayersOfMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRU(8, 8, num_layers=2, dropout=0.5, batch_first=True).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.memory(x)[0]


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (gamma, "_standard_gamma"),
        (lambda x: x * torch.poisson(x.detach().exp()), "poisson"),
        (generated, "rand draws from a generator of its own"),
    ],
)
def test_what_draws_in_other_ways_is_refused_by_name(layer: Any, said: str, laptop: Any) -> None:
    module = Noisy(layer)
    with pytest.raises(CaptureError, match=said) as caught:
        distribute(module, torch.optim.SGD(module.parameters(), 0.1), laptop, chips=1)(batch(0))
    assert caught.value.where.startswith(f"{__file__}:")


def test_in_eval_mode_nothing_is_drawn(laptop: Any, one_thread: None) -> None:
    for layer in (nn.Dropout(0.5), TwoLayersOfMemory(), nn.RReLU()):
        module = Noisy(layer).eval()
        expected = module(**batch(0)).item()
        step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=Plan(dp=2), chips=2)
        assert step.evaluate(batch(0)) == pytest.approx(expected, rel=1e-12)


def test_modules_that_a_first_forward_makes_leave_later_numbers_alone() -> None:
    assert torch.equal(drawn(lambda: (nn.Linear(3, 3), torch.rand(4))[1]), drawn(lambda: torch.rand(4)))


def test_draws_that_no_key_decides_are_refused_wherever_they_are(laptop: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.distributions.Dirichlet(self.lin(x).exp()).rsample().square().mean()

    module = Model()
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=Plan(), chips=1)
    with pytest.raises(CaptureError, match="_sample_dirichlet draws"):
        step({"x": torch.ones(4, 4)})


DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
WITHOUT_CHANCE: dict[str, Callable[[], Any]] = {
    **{f"{f.__name__} of {p}, {t}, {i}": lambda f=f, p=p, t=t, i=i: written_over(lambda x: f(x[..., None], p, t, i))
       for f in DROPOUTS for p in (0.0, 1.0, -0.1, 1.5) for t in (True, False) for i in (True, False)},
    **{f"{f.__name__} of whole numbers": lambda f=f: f(torch.ones(4, 6, dtype=torch.int64), 0.5) for f in DROPOUTS},
    "rrelu": lambda: written_over(lambda x: F.rrelu(x.neg_(), 0.3, 0.3, True, True)),
    "rrelu backwards": lambda: F.rrelu(NUMBERS, 0.4, 0.1),
    "randint of none": lambda: torch.randint(2, 2, (3,)), "randint backwards": lambda: torch.randint(5, 1, (3,)),
    "random_ of none": lambda: torch.zeros(3).random_(2, 2), "one number": lambda: torch.randint(3, 4, (3,)),
    "randint_like of none": lambda: torch.randint_like(NUMBERS, 2, 2),
    "whole rand": lambda: torch.rand(3, dtype=torch.int64), "whole randn_like": lambda: torch.randn_like(THREE.long()),
    "normal_": lambda: torch.zeros(3).normal_(2.0, -1.0), "uniform_": lambda: torch.zeros(3).uniform_(3.0, 2.0),
    "exponential_": lambda: torch.zeros(3).exponential_(-1.0), "log_normal_": lambda: torch.zeros(3).log_normal_(0, 0),
    "geometric_": lambda: torch.zeros(3).geometric_(2.0), "normal": lambda: torch.normal(0.0, -1.0, (3,)),
    "whole bernoulli": lambda: torch.bernoulli(torch.tensor([0, 1])),
    "bernoulli": lambda: torch.ones(3).bernoulli_(2.0),
    "cauchy_": lambda: torch.zeros(3).cauchy_(0.0, -1.0), "type": lambda: torch.randperm(1, dtype=torch.int32),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:dropout")
@pytest.mark.parametrize("name", WITHOUT_CHANCE)
def test_what_no_chance_decides_is_as_torch_does_it_or_refuses_it(name: str) -> None:
    def made() -> Any:
        try:
            return WITHOUT_CHANCE[name]()
        except (NotImplementedError, RuntimeError, ValueError):
            return "refused"

    expected, found = made(), drawn(made)
    if isinstance(expected, str):
        assert found == expected
    else:
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_attention_that_sees_nothing_gives_nothing_with_dropout_too() -> None:
    q, mask = (
        torch.randn(1, 3, 4, dtype=torch.float64),
        torch.tensor([[True, True, True], [False] * 3, [True] * 3]),
    )
    nothing = drawn(lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=mask, dropout_p=1e-300))
    mask = torch.zeros(3, 3, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    assert torch.allclose(nothing, F.scaled_dot_product_attention(q, q, q, attn_mask=mask))
