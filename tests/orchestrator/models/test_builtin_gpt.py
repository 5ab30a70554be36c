"""The built-in GPT: causal, invariant where it must be, and the same values whatever the order of creation."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from orchestrator.models.builtin_gpt import (
    GPT,
    TP_PLAN,
    build_gpt,
    initial_parameter,
    next_token_loss,
    repeat_heads,
    rotary_angles,
    rotate,
)
from orchestrator.models.model_specs import GPT_PRESETS, Activation, GPTOptions, Norm

VARIANTS = [
    GPTOptions(2, 32, 4),
    GPTOptions(2, 32, 4, norm=Norm.RMS, rotary=True, activation=Activation.SWIGLU, bias=False),
    GPTOptions(2, 32, 4, kv_heads=2, activation=Activation.RELU, tied=True, rotary=True),
    GPTOptions(1, 32, 2, kv_heads=1, mlp_width=48, bias=False, vocab=300, max_seq=64),
]


def parameter_count(options: GPTOptions) -> int:
    """The closed form: tied embeddings count once."""
    width, hidden, bias = options.width, options.hidden_width, int(options.bias)
    kv_width = options.num_kv_heads * options.head_width
    norm = width * (2 if options.norm is Norm.LAYER and options.bias else 1)
    ups = 2 if options.activation is Activation.SWIGLU else 1
    attention = 2 * width * width + 2 * width * kv_width + bias * (2 * width + 2 * kv_width)
    mlp = (ups + 1) * width * hidden + bias * (ups * hidden + width)
    embeddings = options.vocab * width * (1 if options.tied else 2)
    positions = 0 if options.rotary else options.max_seq * width
    return options.layers * (attention + mlp + 2 * norm) + norm + embeddings + positions


def gpt(options: GPTOptions, seed: int = 0) -> GPT:
    return build_gpt(options, device=torch.device("cpu"), dtype=torch.float64, seed=seed)


def tokens(batch: int, seq: int) -> Tensor:
    return torch.randint(0, 256, (batch, seq), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", VARIANTS)
def test_no_position_sees_a_later_one(options: GPTOptions) -> None:
    model, ids = gpt(options), tokens(2, 12)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("options", VARIANTS)
def test_every_parameter_gets_a_gradient_and_the_count_is_the_closed_form(options: GPTOptions) -> None:
    model, ids = gpt(options), tokens(2, options.max_seq if options.max_seq < 100 else 12)
    model(ids, labels=ids).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(options)


@pytest.mark.parametrize("options", VARIANTS)
def test_start_loss_is_that_of_a_uniform_guess(options: GPTOptions) -> None:
    ids = tokens(8, 32)
    assert gpt(options)(ids, labels=ids.roll(1)).item() == pytest.approx(math.log(options.vocab), abs=0.4)


def test_loss_is_the_mean_over_labelled_positions_only() -> None:
    logits, labels = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)), tokens(2, 5) % 7
    labels[0, 3:] = -100
    kept = [
        F.cross_entropy(logits[b, t], labels[b, t]) for b in range(2) for t in range(5) if labels[b, t] >= 0
    ]
    assert torch.allclose(next_token_loss(logits, labels), torch.stack(kept).mean())


def test_half_precision_logits_are_summed_in_fp32_and_fp64_stays() -> None:
    labels = tokens(2, 5)
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        assert next_token_loss(torch.zeros(2, 5, 256, dtype=dtype), labels).dtype is expected


def test_rotary_scores_depend_on_distance_alone() -> None:
    like = torch.zeros(0, dtype=torch.float64)
    cos, sin = rotary_angles(40, 8, like)
    query, key = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    queries, keys = rotate(query.expand(40, 8), cos, sin), rotate(key.expand(40, 8), cos, sin)
    scores = queries @ keys.T
    assert torch.allclose(scores.diagonal(-5), scores[5, 0].expand(35))
    assert torch.allclose(queries.norm(dim=1), query.norm().expand(40))


def test_rotary_angles_are_right_at_long_range_in_half_precision() -> None:
    cos, _ = rotary_angles(4096, 8, torch.zeros(0, dtype=torch.bfloat16))
    assert cos.dtype is torch.bfloat16
    assert cos[4001, 0].item() == pytest.approx(math.cos(4001), abs=0.005)


def test_grouped_heads_equal_whole_heads_with_copied_keys() -> None:
    grouped = gpt(VARIANTS[2])
    whole = gpt(GPTOptions(2, 32, 4, activation=Activation.RELU, tied=True, rotary=True))
    state = grouped.state_dict()
    for name, tensor in state.items():
        if ".key." in name or ".value." in name:
            heads = tensor.unflatten(0, (2, 8))
            state[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    whole.load_state_dict(state)
    assert torch.allclose(whole(tokens(2, 9)), grouped(tokens(2, 9)))
    assert repeat_heads(torch.arange(2).view(1, 2, 1, 1), 2).flatten().tolist() == [0, 0, 1, 1]


def test_start_values_depend_on_seed_and_name_alone() -> None:
    shallow, deep = GPTOptions(2, 32, 4), GPTOptions(4, 32, 4)
    name, shape = "blocks.1.attention.query.weight", torch.Size((32, 32))
    value = initial_parameter(name, shape, shallow, seed=5)
    assert torch.equal(value, initial_parameter(name, shape, deep, seed=5))
    assert torch.equal(gpt(shallow, seed=5).get_parameter(name), value.double())
    assert not torch.equal(value, initial_parameter(name, shape, shallow, seed=6))
    assert not torch.equal(value, initial_parameter(name.replace("1", "0"), shape, shallow, seed=5))


def test_residual_writers_start_smaller_norms_at_one_and_biases_at_zero() -> None:
    options = GPTOptions(8, 128, 4)
    shape = torch.Size((128, 128))
    plain = initial_parameter("blocks.0.mlp.up.weight", shape, options, 0).std()
    writer = initial_parameter("blocks.0.mlp.down.weight", shape, options, 0).std()
    assert plain.item() == pytest.approx(math.sqrt(2 / (5 * 128)), rel=0.05)
    assert (plain / writer).item() == pytest.approx(4, rel=0.05)
    assert initial_parameter("norm.weight", torch.Size((4,)), options, 0).tolist() == [1, 1, 1, 1]
    assert initial_parameter("norm.bias", torch.Size((4,)), options, 0).tolist() == [0, 0, 0, 0]


def test_tied_head_and_embedding_are_one_parameter() -> None:
    model = gpt(VARIANTS[2])
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("options", VARIANTS)
def test_tensor_parallel_plan_names_every_linear_layer(options: GPTOptions) -> None:
    model = gpt(options)
    matrices = (torch.nn.Linear, torch.nn.Embedding)
    names = [name for name, module in model.named_modules() if isinstance(module, matrices)]
    patterns = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    assert patterns - {"positions"} <= set(TP_PLAN)


@pytest.mark.parametrize(
    ("preset", "billions"),
    [("gpt-small", 0.125), ("gpt-1.3b", 1.3), ("gpt-6.7b", 6.7), ("gpt-13b", 13.0), ("gpt-175b", 175.0)],
)
def test_presets_have_the_size_they_are_named_for(preset: str, billions: float) -> None:
    assert parameter_count(GPT_PRESETS[preset]) / 1e9 == pytest.approx(billions, rel=0.025)


@pytest.mark.parametrize("preset", GPT_PRESETS)
def test_every_preset_has_the_parameters_of_the_closed_form(preset: str) -> None:
    options = GPT_PRESETS[preset]
    model = build_gpt(options, device=torch.device("meta"), dtype=torch.bfloat16, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(options)
