"""Rules of operators that compute: sample by sample nothing is exchanged, over samples only sums and means are sums."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from comms.errors import CaptureError

Check = Callable[..., Any]
Batch = Mapping[str, torch.Tensor]
MASK = torch.tensor([[True, False, True], [True, True, False], [False, True, True]])


def layer(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().double()


WEIGHTS = {shape: torch.linspace(-1, 1, torch.Size(shape).numel()).double().view(shape)
           for shape in ((4,), (3, 4), (4, 4), (2, 4), (4, 2), (5, 3, 2), (2, 3, 1, 2), (3, 2, 2))}  # fmt: skip


def images(h: torch.Tensor) -> torch.Tensor:
    """[samples, 3 channels, 2, 2]."""
    return h.view(-1, 3, 2, 2)


def heads(h: torch.Tensor) -> torch.Tensor:
    return h.view(-1, 3, 2, 2).transpose(1, 2)


# of hidden states [8 samples, 3, 4]; the module gives parameters
SAMPLEWISE: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "polynomial": lambda h, m: 2 * h**3 - h / 3 + h.abs().sqrt() - 1.5,
    "rsub and reciprocal": lambda h, m: 1 / (2 + h.square()) - (1 - h),
    "activations": lambda h, m: F.gelu(h) + F.silu(h) + F.elu(h) + F.leaky_relu(h) + F.softplus(h) + F.mish(h),
    "hard activations": lambda h, m: F.hardswish(h) + F.hardsigmoid(h) + F.relu6(h) + F.softsign(h) + F.selu(h),
    "log sigmoid": lambda h, m: F.logsigmoid(h) + F.tanhshrink(h) + F.hardshrink(h) + F.threshold(h, 0.1, 2.0),
    "trigonometry": lambda h, m: h.sin() * h.cos() + h.atan2(h + 3) + h.tanh(),
    "rounding": lambda h, m: h.round() + h.floor() * h.ceil() + h.trunc() + h.frac() + h.sign(),
    "comparisons": lambda h, m: (h > 0).double() * h + (h.abs() < 1).double() + (h == h).double(),
    "logic": lambda h, m: h * ((h > 0) & ~(h > 1) | (h < -1)).double(),
    "where": lambda h, m: torch.where(h > 0, h, h.exp()),
    "clamp": lambda h, m: h.clamp(-0.5, 0.5) + h.clamp(min=m.mean),
    "masked_fill": lambda h, m: h.masked_fill(h > 1, 0.5),
    "lerp": lambda h, m: torch.lerp(h, h.sin(), 0.3) + torch.addcmul(h, h, h, value=0.1),
    "nan_to_num": lambda h, m: (h.log() * 0).nan_to_num(0.5, 1.0, 2.0) + h,
    "erf": lambda h, m: h.erf() + torch.special.expit(h) + torch.special.xlogy(h.abs(), h.abs() + 1),
    "maximum": lambda h, m: torch.maximum(h, h.sin()) + torch.minimum(h, m.lin.bias),
    "with parameters": lambda h, m: h * m.lin.bias + m.lin.weight[:3],
    "with numbers": lambda h, m: h * WEIGHTS[3, 4] + torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "broadcast over samples": lambda h, m: h + h[:, :1] * h[..., -1:],
    "broadcast behind": lambda h, m: h.sum((1, 2)).view(-1, 1, 1) * h,
    "casts": lambda h, m: h.float().double() + h.to(torch.int64).to(h) + h.long().type_as(h),
    "detached": lambda h, m: h * h.detach() - h.clone().contiguous(),
    "softmax": lambda h, m: h.softmax(-1) + h.log_softmax(1) + F.softmin(h, -1),
    "sums of each": lambda h, m: h.sum(-1) + h.mean((1, 2), keepdim=True)[..., 0] + h.sum(-1).prod(1, keepdim=True),
    "sums kept": lambda h, m: h.sum(1, keepdim=True) * h.mean(-1, True),
    "extremes of each": lambda h, m: h.amax(-1) + h.amin(1, keepdim=True)[..., 0] + h.max(-1).values - h.min(-1)[0],
    "positions of extremes": lambda h, m: h.sum(-1) + h.argmax(-1) * h.argmin(1, keepdim=True)[..., 0],
    "spread of each": lambda h, m: h.var(-1) + h.std(1, keepdim=True)[:, 0, :3] + torch.var_mean(h, -1)[1],
    "norms of each": lambda h, m: h.norm(dim=-1) + torch.linalg.vector_norm(h, 1, -1) + h.norm(p=3, dim=-1),
    "normalize": lambda h, m: F.normalize(h, dim=-1),
    "logsumexp": lambda h, m: h.logsumexp(-1) + h.logsumexp((1, 2)).unsqueeze(-1),
    "any and all": lambda h, m: h.sum(-1) + (h > 1).any(-1).double() - (h > -2).all(-1).double(),
    "running": lambda h, m: h.cumsum(1) + h.cumprod(-1) + h.logcumsumexp(1) + h.cummax(-1).values,
    "sorted": lambda h, m: h.sort(-1).values + h.sort(1, descending=True)[0] + h.argsort(-1),
    "topk": lambda h, m: h.topk(2, -1).values.sum(-1) + h.kthvalue(2, -1).values + h.median(-1).values,
    "glu": lambda h, m: F.glu(h, -1),
    "layer_norm": lambda h, m: F.layer_norm(h, (4,), m.lin.bias, m.lin.bias) + F.layer_norm(h, (3, 4)),
    "rms_norm": lambda h, m: F.rms_norm(h, (4,), m.lin.bias),
    "group_norm": lambda h, m: F.group_norm(images(h), 3, WEIGHTS[(3, 4)][:, 0]),
    "instance_norm": lambda h, m: F.instance_norm(images(h)),
    "batch_norm of given statistics": lambda h, m: F.batch_norm(h.flatten(0, 1), m.mean, m.mean + 1, training=False),
    "local response": lambda h, m: F.local_response_norm(images(h), 2),
    "matmul": lambda h, m: h @ m.lin.weight + torch.matmul(m.lin.weight[:3, :3], h),
    "matmul of each with itself": lambda h, m: h @ h.mT + torch.bmm(h, h.transpose(1, 2)),
    "matmul with a vector": lambda h, m: h @ m.lin.bias + (m.lin.bias[:3] @ h)[:, :3],
    "addmm": lambda h, m: torch.addmm(m.lin.bias, h.flatten(0, 1), m.lin.weight),
    "baddbmm": lambda h, m: torch.baddbmm(h[:, :, :3], h, h.mT, beta=0.5),
    "linear": lambda h, m: F.linear(h, WEIGHTS[2, 4], m.lin.bias[:2]) + m.lin(h)[..., :2],
    "einsum": lambda h, m: torch.einsum("bsd,de->bse", h, m.lin.weight) + torch.einsum("bsd,btd,bte->bse", h, h, h),
    "einsum with dots": lambda h, m: torch.einsum("...d,de->...e", h, m.lin.weight) + torch.einsum(
        "b...,b...->b...", h, h.sin()),
    "bilinear on views": lambda h, m: F.bilinear(h[:, None].expand(-1, 2, -1, -1), h[:, None].expand(-1, 2, -1, -1),
                                                 torch.stack([m.lin.weight, m.lin.weight.t()])),
    "fourier": lambda h, m: torch.fft.irfft(torch.fft.rfft(h, dim=1) * 0.5, dim=1, n=h.shape[1]),
    "fourier of two dims": lambda h, m: torch.fft.fft2(h).real,
    "bilinear": lambda h, m: F.bilinear(h, h.sin(), torch.stack([m.lin.weight, m.lin.weight.t()])),
    "outer of each": lambda h, m: torch.einsum("bsd,bse->bde", h, h),
    "tensordot": lambda h, m: torch.tensordot(h, m.lin.weight, dims=([2], [1])),
    "conv1d": lambda h, m: F.conv1d(h, WEIGHTS[5, 3, 2]),
    "conv2d": lambda h, m: F.conv2d(images(h), WEIGHTS[2, 3, 1, 2], m.lin.bias[:2]),
    "conv_transpose1d": lambda h, m: F.conv_transpose1d(h, WEIGHTS[3, 2, 2], stride=2),
    "pooling": lambda h, m: F.max_pool2d(images(h), 2) + F.avg_pool2d(images(h), 2),
    "adaptive pooling": lambda h, m: F.adaptive_avg_pool2d(images(h), 1),
    "pooling of sequences": lambda h, m: F.max_pool1d(h, 2) + F.avg_pool1d(h, 2) + F.adaptive_max_pool1d(h, 2),
    "resizing": lambda h, m: F.interpolate(images(h), scale_factor=2),
    "resizing smoothly": lambda h, m: F.interpolate(images(h), size=(4, 4), mode="bilinear"),
    "padding of images": lambda h, m: F.pad(images(h), (1, 1, 1, 1), mode="reflect") + F.pad(images(h), (1, 1, 1, 1)),
    "pixel_shuffle": lambda h, m: F.pixel_shuffle(h.view(-1, 4, 3, 1), 2),
    "unfold": lambda h, m: F.unfold(images(h), 2) + F.fold(F.unfold(images(h), 1), 2, 1).view(-1, 12, 1),
    "grid_sample": lambda h, m: F.grid_sample(
        images(h), images(h)[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False),
    "attention": lambda h, m: F.scaled_dot_product_attention(heads(h), heads(h), heads(h), is_causal=True),
    "attention with a mask": lambda h, m: F.scaled_dot_product_attention(heads(h), heads(h), heads(h), MASK),
    "attention by samples' masks": lambda h, m: F.scaled_dot_product_attention(
        heads(h), heads(h), heads(h), (h.sum(-1) > -9).view(-1, 1, 1, 3)),
    "attention written out": lambda h, m: (heads(h) @ heads(h).mT / 2).masked_fill(~MASK, -1e9).softmax(-1) @ heads(h),
    "cosine_similarity": lambda h, m: F.cosine_similarity(h, m.lin.weight[:3], -1),
    "distances": lambda h, m: F.pairwise_distance(h, h.cos()),
    "complex": lambda h, m: torch.polar(h.exp(), h).real + torch.complex(h, h).abs(),
    "addcdiv": lambda h, m: torch.addcdiv(h, h, h.exp(), value=2.0) + torch.hypot(h, h + 1),
    "remainders": lambda h, m: torch.fmod(h, 0.7) + torch.remainder(h, 0.7),
    "dropout in evaluation": lambda h, m: F.dropout(h, 0.5, training=False) + F.alpha_dropout(h, 0.5, training=False),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLEWISE)
def test_samplewise_operators_exchange_nothing(name: str, check: Check, sequences: Batch) -> None:
    parted = check(lambda m, x: SAMPLEWISE[name](m.lin(x), m).sin().square().mean(), sequences)
    assert not [target for target in parted.targets() if target.startswith("orchestrate")]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(4, 5, num_layers=2, batch_first=True),
    "gru": lambda: nn.GRU(4, 5, batch_first=True, bidirectional=True),
    "rnn": lambda: nn.RNN(4, 5, batch_first=True, nonlinearity="relu"),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0),
    "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    "batch norm in evaluation": lambda: nn.BatchNorm1d(3).eval(),
    "prelu": lambda: nn.PReLU(3),
}


def applied(made: nn.Module, h: torch.Tensor) -> torch.Tensor:
    """One number of each sample, of all that the layer returns."""
    if isinstance(made, nn.MultiheadAttention):
        return sum(value.sin().mean((1, 2)) for value in made(h, h, h))
    if not isinstance(made, nn.RNNBase):
        return made(h).sin().mean((1, 2))
    output, states = made(h)
    flat = states if isinstance(states, tuple) else (states,)  # [layers, samples, features]
    return output.sin().mean((1, 2)) + sum(state.sin().mean((0, 2)) for state in flat)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_torch_work_sample_by_sample(name: str, check: Check, sequences: Batch) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return applied(m.made, m.lin(x)).square().mean()

    parted = check(forward, sequences, make=lambda: layer(LAYERS[name]))
    assert not [target for target in parted.targets() if target.startswith("orchestrate")]


def square(h: torch.Tensor) -> torch.Tensor:
    """Of every sample a matrix that can be inverted."""
    return h @ h.transpose(-1, -2) + 2 * torch.eye(3, dtype=h.dtype)


MATRICES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "inverse": lambda h: torch.linalg.inv(square(h)),
    "determinant": lambda h: torch.linalg.det(square(h)),
    "logarithm of it": lambda h: torch.logdet(square(h)),
    "sign and logarithm": lambda h: torch.linalg.slogdet(square(h))[1],
    "vectors solved for": lambda h: torch.linalg.solve(square(h), h[..., 0]),
    "matrices solved for": lambda h: torch.linalg.solve(square(h), h),
    "a matrix of all": lambda h: torch.linalg.solve(2 * torch.eye(3, dtype=h.dtype), h),
    "triangular": lambda h: torch.linalg.solve_triangular(square(h), h, upper=True),
    "Cholesky": lambda h: torch.cholesky_solve(h, torch.linalg.cholesky(square(h))),
    "eigenvalues": lambda h: torch.linalg.eigvalsh(square(h)),
    "singular values": lambda h: torch.linalg.svdvals(h),
    "QR": lambda h: torch.linalg.qr(square(h))[1].abs(),
    "exponential": lambda h: torch.linalg.matrix_exp(square(h) / 9),
    "power": lambda h: torch.linalg.matrix_power(square(h), 2) / 9,
}


@pytest.mark.parametrize("name", MATRICES)
def test_every_sample_has_matrices_of_its_own(name: str, check: Check, sequences: Batch) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return MATRICES[name](m.lin(x)).sin().square().mean()

    assert not [target for target in check(forward, sequences).targets() if target.startswith("orchestrate")]


@pytest.mark.parametrize("name", ["cov", "corrcoef"])
def test_covariances_are_those_of_all_samples(name: str, check: Check, sequences: Batch) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        covariances: torch.Tensor = getattr(torch, name)(m.lin(x).sum(1).t())
        return covariances.square().sum()

    check(forward, sequences, dp=4, microbatches=1)


def test_running_statistics_of_instance_norm_are_means_over_all_samples(
    check: Check, sequences: Batch
) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.made(m.lin(x)).sin().square().mean()

    check(forward, sequences, make=lambda: nn.InstanceNorm1d(3, track_running_stats=True).double())


UNKNOWN: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "cdist": (lambda h: torch.cdist(h + 0.1, h.sin()), "_cdist_forward"),
    "diagonal": (lambda h: h[:, :3, :3].diagonal(dim1=1, dim2=2), "diagonal"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_operators_without_a_rule_run_on_all_samples_or_are_refused_by_name(
    name: str, check: Check, parts_of: Check, sequences: Batch
) -> None:
    function, said = UNKNOWN[name]

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return function(m.lin(x)).sin().square().mean()

    assert any(
        "gather_parts" in target for target in check(forward, sequences, dp=4, microbatches=1).targets()
    )
    with pytest.raises(CaptureError, match=f"^{said} mixes samples"):
        parts_of(forward, sequences, dp=2, microbatches=2)


def test_a_recurrent_layer_with_time_first_and_states_of_each_sample(check: Check, sequences: Batch) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.lin(x).transpose(0, 1)
        output, state = m.made(h, h[:1].contiguous())
        return output.square().mean() + state.sin().mean()

    check(forward, sequences, make=lambda: layer(lambda: nn.GRU(4, 4)))


# operators over samples that are sums, and of what they are the sum
SUMS: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "sum": lambda h, m: h.sum(),
    "sum of dims": lambda h, m: h.sum((0, 1)).dot(m.lin.bias),
    "mean": lambda h, m: h.square().mean(),
    "mean of samples": lambda h, m: (h.mean(0) * WEIGHTS[3, 4]).sum(),
    "mean of means": lambda h, m: h.mean(1).mean(0).mean(),
    "linear in a sum": lambda h, m: -3 * h.sum() / 2 + h.mean() * m.lin.bias.sum() - h.square().sum(),
    "a sum and a number": lambda h, m: h.square().mean() + 0.25,
    "a sum and a penalty": lambda h, m: h.square().mean() + 0.1 * m.lin.weight.square().sum(),
    "a number minus a sum": lambda h, m: 1.0 - h.tanh().mean(),
    "a product over samples": lambda h, m: torch.einsum("bsd,bsd->", h, h.sin()),
    "matmul over samples": lambda h, m: (h.flatten(0, 1).t() @ h.flatten(0, 1).sin()).trace(),
    "vector over samples": lambda h, m: h.sum((1, 2)) @ h.sin().sum((1, 2)),
    "gram times weights": lambda h, m: (torch.einsum("bsd,bse->de", h, h) @ m.lin.weight).sum(),
    "count": lambda h, m: h.sum() + (h > 0).sum() + torch.count_nonzero(h > 1),
    "stacked": lambda h, m: torch.stack([h.sum(), h.square().sum(), h.mean()]).sum(),
    "two means": lambda h, m: h[:, 0].square().mean() + 2 * h[:, 1:].tanh().mean(),
    "mse": lambda h, m: F.mse_loss(h, torch.zeros_like(h)),
    "nansum": lambda h, m: h.nansum() + h.nanmean(),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_sums_over_samples_are_sums_over_parts(name: str, check: Check, sequences: Batch) -> None:
    parted = check(lambda m, x: SUMS[name](m.lin(x), m), sequences)
    assert not [target for target in parted.targets() if "sum_parts" in target or "gather" in target]
