"""Randomness by keys: what torch would draw from its global state is computed from counters instead.

A number depends on (seed and step, the number of the call in the forward, its element in the whole batch's tensor)
alone: the same under every plan, after a resume, and when it is computed again. While the mode is active the functions
below draw this way, in a trace and on one chip alike. They draw other numbers than torch does, of the same
distributions.

What draws inside torch's own operators in other ways (gamma and Poisson numbers, say) is refused.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import kernels.ops  # noqa: F401  (registers orchestrate::keyed_uniform)
from comms.errors import CaptureError
from partitioner.capture.forwards.checkpoints import inlined_checkpoints
from partitioner.capture.forwards.replaced import replaced

KEY, FIRST_SAMPLE = "random.key", "random.first_sample"  # names among a batch's entries
ALPHA = -1.7580993408473766  # what SELU tends to: -scale * alpha (Klambauer et al. 2017)
RRELU = (1 / 8, 1 / 3)
ATTENTION = torch.nn.functional.scaled_dot_product_attention
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
INITIALISERS = [name for name in vars(torch.nn.init) if name.endswith("_") and name[0] != "_"]
REFUSED = {"poisson", "binomial", "_standard_gamma", "_sample_dirichlet"}
INSTEAD = "draw with rand, randn, bernoulli or multinomial (as Normal, LogNormal, Laplace, Categorical do)"
IDLE = ("device", "layout", "pin_memory", "memory_format", "requires_grad")  # which change no number
NAMES = {
    "training": "train",
    "lambd": "rate",
    "from": "low",
    "to": "high",
}  # of torch's arguments, as they are here
MANTISSAS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def draws(node: torch.fx.Node) -> bool:
    """Whether an operation draws from torch's own generators."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    # attention and recurrent networks count as random to torch because they may drop out; what does is replaced before
    name = target._schema.name.split("::")[1]
    return "scaled_dot_product" not in name and name not in RECURRENT


@contextmanager
def keyed_random(key: torch.Tensor, first: torch.Tensor) -> Iterator[None]:
    """Draw by keys inside the block: in the user's calls, and in those of torch's own Python functions.

    A function mode is off inside the functions that it sees; what they call is replaced by name. What is checkpointed
    runs once: a second time it would draw as another call.
    """
    mode = KeyedRandom(key, first)
    with inlined_checkpoints(), replaced(_keyed(mode)), mode:
        yield


def _keyed(mode: "KeyedRandom") -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """What is called instead of each function that draws."""
    for name in DRAWN:
        made = partial(_drawn, mode, name)
        for owner in (torch, torch._VF, torch.Tensor):
            if hasattr(owner, name):
                yield owner, name, _method(made) if owner is torch.Tensor else made
    yield torch.nn.functional, "scaled_dot_product_attention", partial(_any_attention, mode)
    for name in INITIALISERS:
        yield torch.nn.init, name, partial(_uncounted, mode, getattr(torch.nn.init, name))


def _uncounted(mode: "KeyedRandom", function: Callable[..., Any], /, *args: Any, **given: Any) -> Any:
    """Modules that a first forward makes, and later ones find, do not move the numbers of the calls after them."""
    calls = mode.calls
    try:
        return function(*args, **given)
    finally:
        mode.calls = calls


def _drawn(mode: "KeyedRandom", name: str, *args: Any, **given: Any) -> torch.Tensor:
    """What a function of torch would draw: where it would write it, if it is told to."""
    if given.pop("generator", None) is not None:
        raise CaptureError(f"{name} draws from a generator of its own", hint="leave the generator out")
    args = (*(given.pop(first) for first in ("input", "self") if first in given), *args)
    place = args[0] if given.pop("inplace", False) or name.endswith("_") else given.pop("out", None)
    drawn = DRAWN[name](mode, *args, **{NAMES.get(n, n): v for n, v in given.items() if n not in IDLE})
    if place is None:
        return drawn
    _require(place.shape == drawn.shape, f"{name} resizes the tensor that it writes into")
    return place.copy_(drawn)


def _require(is_right: bool, said: str) -> None:
    if not is_right:
        raise ValueError(said)


def _method(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda self, *args, **given: function(self, *args, **given)


class KeyedRandom(TorchFunctionMode):
    """Draws by `key` (of seed and step) for samples from `first` on; both are 0-dim tensors of whole numbers."""

    def __init__(self, key: torch.Tensor, first: torch.Tensor) -> None:
        super().__init__()
        self.key, self.first, self.calls = key, first, 0

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, given = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in DRAWN and getattr(func, "__module__", "") != "torch.nn.init":
            return _drawn(self, name, *args, **given)
        if name in REFUSED:
            raise CaptureError(f"{name} draws random numbers in a way that cannot be split", hint=INSTEAD)
        if name in RECURRENT and _recurrent_dropout(args):
            if isinstance(args[2], torch.Tensor):
                problem = "dropout between the layers of a recurrent network over packed sequences"
                raise CaptureError(problem, hint="use one layer each, with nn.Dropout between them")
            return _recurrent(self, func, *args)
        if name == "scaled_dot_product_attention":
            return _any_attention(self, *args, **given)
        return func(*args, **given)

    def uniform(self, shape: Sequence[int], like: torch.Tensor | None = None) -> torch.Tensor:
        """Numbers in [0, 1) as float64; samples lie where they lie in `like`, else in the dim that grows with them."""
        self.calls += 1
        drawn: torch.Tensor = torch.ops.orchestrate.keyed_uniform(
            self.key, self.first, None if like is None else like.detach(), self.calls, list(shape), 0, 0, 0
        )
        return drawn

    def normal(self, shape: Sequence[int], like: torch.Tensor | None = None) -> torch.Tensor:
        """Standard normal numbers (Box and Muller 1958), as float64."""
        radius = torch.sqrt(-2.0 * torch.log1p(-self.uniform(shape, like)))
        return radius * torch.cos(2.0 * math.pi * self.uniform(shape, like))


def _recurrent_dropout(args: Sequence[Any]) -> bool:
    """Their arguments end with ..., number of layers, dropout, whether training, ..."""
    place = next((i for i, a in enumerate(args) if isinstance(a, float)), None)
    return place is not None and args[place] > 0 and bool(args[place + 1]) and args[place - 1] > 1


def _recurrent(
    mode: KeyedRandom, layer: Callable[..., Any], x: torch.Tensor, start: Any, weights: Sequence[torch.Tensor],
    has_biases: bool, num_layers: int, p: float, train: bool, *rest: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """A recurrent network layer by layer, with dropout between them. `start`: hidden states (and cells) of all."""
    states, each = ([start] if isinstance(start, torch.Tensor) else list(start)), len(weights) // num_layers
    ends: list[list[torch.Tensor]] = []
    for index, own in enumerate(zip(*(s.chunk(num_layers) for s in states), strict=True)):
        given = own[0] if isinstance(start, torch.Tensor) else own
        taken = weights[index * each : (index + 1) * each]
        x, *end = layer(x, given, taken, has_biases, 1, 0.0, train, *rest)
        ends.append(end)
        x = _dropout(mode, x, p) if index < num_layers - 1 else x
    return x, *map(torch.cat, zip(*ends, strict=True))


def _dropout_of_attention(args: Sequence[Any], given: Mapping[str, Any]) -> float:
    return float(given.get("dropout_p", args[4] if len(args) > 4 else 0.0))


def _shape(numbers: Sequence[Any], size: Sequence[int] | None) -> list[int]:
    given = numbers if size is None else size
    return list(given[0]) if len(given) == 1 and not isinstance(given[0], int) else list(given)


def _made(
    draw: Callable[..., torch.Tensor], size: Sequence[int], like: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Numbers of a dtype; complex ones have two parts, which share the variance of normal numbers."""
    kind = dtype or (torch.get_default_dtype() if like is None else like.dtype)
    _require(kind.is_floating_point or kind.is_complex, f"numbers of {kind} cannot be drawn")
    if not kind.is_complex:
        return draw(size, like).to(kind)
    share = math.sqrt(0.5) if draw.__name__ == "normal" else 1.0
    return torch.complex(draw(size, like) * share, draw(size, like) * share).to(kind)


def _mask(mode: KeyedRandom, x: torch.Tensor, p: float, shape: Sequence[int] | None = None) -> torch.Tensor:
    """Ones where entries are kept."""
    _require(x.is_floating_point() or x.is_complex(), f"dropout of whole numbers ({x.dtype})")
    drawn = mode.uniform(x.shape if shape is None else shape, x if shape is None else None)
    return (drawn >= p).to(x.dtype)


def _is_idle(p: float, train: bool) -> bool:
    _require(0 <= p <= 1, f"dropout probability has to be between 0 and 1, but got {p}")
    return not train or p == 0


def _dropout(mode: KeyedRandom, x: torch.Tensor, p: float = 0.5, train: bool = True) -> torch.Tensor:
    if _is_idle(p, train):
        return x
    return x * _mask(mode, x, p) * (1.0 / (1.0 - p) if p < 1 else 0.0)


def _feature_dropout(mode: KeyedRandom, x: torch.Tensor, p: float = 0.5, train: bool = True) -> torch.Tensor:
    """Whole channels are dropped: [samples, channels, ...]."""
    if _is_idle(p, train):
        return x
    mask = _mask(mode, x, p, [*x.shape[:2], *[1] * (x.dim() - 2)])
    return x * mask * (1.0 / (1.0 - p) if p < 1 else 0.0)


def _alpha_dropout(
    mode: KeyedRandom, x: torch.Tensor, p: float = 0.5, train: bool = True, *, by_feature: bool = False
) -> torch.Tensor:
    if _is_idle(p, train):
        return x
    if p == 1:
        return x * 0.0
    mask = _mask(mode, x, p, [*x.shape[:2], *[1] * (x.dim() - 2)] if by_feature else None)
    scale = (1.0 - p + ALPHA**2 * p * (1.0 - p)) ** -0.5
    return (x * mask + ALPHA * (1.0 - mask)) * scale - scale * p * ALPHA


def _rrelu(
    mode: KeyedRandom, x: torch.Tensor, lower: float = RRELU[0], upper: float = RRELU[1], train: bool = False
) -> torch.Tensor:
    _require(lower <= upper, f"rrelu from {lower} to {upper}")
    slope: Any = (lower + upper) / 2
    if train:
        slope = (lower + (upper - lower) * mode.uniform(x.shape, x)).to(x.dtype)
    return torch.where(x >= 0, x, x * slope)


def _attention(
    mode: KeyedRandom, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Attention written out, with dropout of its weights."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    root = abs(scale) ** 0.5  # both operands are scaled, as torch does
    scores = q * root @ (k * math.copysign(root, scale)).transpose(-2, -1)
    _require(not is_causal or attn_mask is None, "attn_mask beside is_causal")
    if is_causal:
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if attn_mask is not None:
        is_bool = attn_mask.dtype is torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if is_bool else scores + attn_mask
    softmax = torch.softmax if attn_mask is None else torch._safe_softmax  # of who may see nothing: nothing
    return _dropout(mode, softmax(scores, -1), dropout_p, True) @ v


def _any_attention(mode: KeyedRandom, *args: Any, **given: Any) -> torch.Tensor:
    if _dropout_of_attention(args, given):
        return _attention(mode, *args, **given)
    return ATTENTION(*args, **given)


def _bernoulli(mode: KeyedRandom, x: torch.Tensor, p: Any = None) -> torch.Tensor:
    _require(p is not None or x.is_floating_point(), f"probabilities of {x.dtype}")
    _require(not isinstance(p, float) or 0 <= p <= 1, f"a probability of {p}")
    return (mode.uniform(x.shape, x) < (x if p is None else p)).to(x.dtype)


def _between(bounds: Sequence[int], low: int | None, high: int | None) -> tuple[int, Any]:
    """The two bounds of whole numbers: one alone is the upper one."""
    if len(bounds) == 1 and high is None:
        low, high = low or 0, bounds[0]
    elif bounds:
        low, high = bounds if len(bounds) == 2 else (bounds[0], high)
    _require(high is None or (low or 0) < high, f"whole numbers from {low} to below {high}")
    return low or 0, high


def _randint(
    mode: KeyedRandom, *given: Any, size: Sequence[int] | None = None, low: int | None = None, high: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    *bounds, last = given if size is None else (*given, size)
    low, high = _between(bounds, low, high)
    return (low + mode.uniform(last) * (high - low)).floor().to(dtype or torch.int64)


def _randint_like(
    mode: KeyedRandom, x: torch.Tensor, *bounds: int, low: int | None = None, high: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    low, high = _between(bounds, low, high)
    return (low + mode.uniform(x.shape, x) * (high - low)).floor().to(dtype or x.dtype)


def _exponential(mode: KeyedRandom, x: torch.Tensor, rate: float = 1.0) -> torch.Tensor:
    _require(rate > 0, f"an exponential rate of {rate}")
    return -torch.log1p(-mode.uniform(x.shape, x)) / rate


def _uniform(mode: KeyedRandom, x: torch.Tensor, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    _require(low <= high and x.is_floating_point(), f"{x.dtype} from {low} to {high}")
    return low + (high - low) * mode.uniform(x.shape, x)


def _normal(mode: KeyedRandom, x: torch.Tensor, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    _require(std >= 0 and (x.is_floating_point() or x.is_complex()), f"{x.dtype} with a deviation of {std}")
    return mean + std * _made(mode.normal, x.shape, x, torch.promote_types(x.dtype, torch.float64))


def _normal_around(
    mode: KeyedRandom, mean: Any = 0.0, std: Any = 1.0, size: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    _require(isinstance(std, torch.Tensor) or std >= 0, f"a standard deviation of {std}")
    if size is not None:
        return mean + std * _made(mode.normal, list(size), dtype=dtype)
    mean, std = (v.detach() if isinstance(v, torch.Tensor) else v for v in (mean, std))
    like = mean if isinstance(mean, torch.Tensor) else std
    if isinstance(mean, torch.Tensor) and isinstance(std, torch.Tensor) and mean.shape != std.shape:
        like = mean + std
    return (mean + std * mode.normal(like.shape, like)).to(like.dtype)


def _multinomial(
    mode: KeyedRandom, x: torch.Tensor, num_samples: int, replacement: bool = False
) -> torch.Tensor:
    """Without replacement the first arrivals, at rates x; with it, where numbers fall among sums of x."""
    rates = x.detach().double()
    if num_samples == 1 or not replacement:
        waits = -torch.log1p(-mode.uniform(x.shape, x)).clamp(max=-torch.finfo(rates.dtype).tiny)
        return (rates / waits).topk(num_samples).indices
    shape = [*x.shape[:-1], num_samples]
    drawn = mode.uniform(shape, x[..., :1].expand(shape)) * rates.sum(-1, keepdim=True)
    below = rates.cumsum(-1).unsqueeze(-2) <= drawn.unsqueeze(-1)
    return below.sum(-1).clamp(max=x.shape[-1] - 1)


def _random(
    mode: KeyedRandom, x: torch.Tensor, *bounds: int, low: int | None = None, high: int | None = None
) -> torch.Tensor:
    """Whole numbers: between bounds, or all that the dtype has."""
    low, high = _between(bounds, low, high)
    if high is None:
        mantissa = MANTISSAS.get(x.dtype)
        high = 2**mantissa + 1 if mantissa else 2 if x.dtype is torch.bool else torch.iinfo(x.dtype).max + 1
    return (low + mode.uniform(x.shape, x) * (high - low)).floor()


def _cauchy(mode: KeyedRandom, x: torch.Tensor, median: float = 0.0, sigma: float = 1.0) -> torch.Tensor:
    _require(sigma > 0, f"a Cauchy sigma of {sigma}")
    return median + sigma * torch.tan(math.pi * (mode.uniform(x.shape, x) - 0.5))


def _log_normal(mode: KeyedRandom, x: torch.Tensor, mean: float = 1.0, std: float = 2.0) -> torch.Tensor:
    _require(std > 0, f"a standard deviation of {std}")
    return (mean + std * mode.normal(x.shape, x)).exp()


def _geometric(mode: KeyedRandom, x: torch.Tensor, p: float) -> torch.Tensor:
    _require(0 < p < 1, f"a geometric probability of {p}")
    return (torch.log1p(-mode.uniform(x.shape, x)) / math.log1p(-p)).floor() + 1


# By the names of torch's functions and methods; what those that end in _ return is written over their first argument.
DRAWN: Mapping[str, Callable[..., torch.Tensor]] = {
    "dropout": _dropout,
    "dropout_": _dropout,
    "feature_dropout": _feature_dropout,
    "feature_dropout_": _feature_dropout,
    "alpha_dropout": _alpha_dropout,
    "alpha_dropout_": _alpha_dropout,
    "feature_alpha_dropout": partial(_alpha_dropout, by_feature=True),
    "rrelu": _rrelu,
    "rrelu_": _rrelu,
    "rand": lambda mode, *n, size=None, dtype=None: _made(mode.uniform, _shape(n, size), dtype=dtype),
    "randn": lambda mode, *n, size=None, dtype=None: _made(mode.normal, _shape(n, size), dtype=dtype),
    "rand_like": lambda mode, x, dtype=None: _made(mode.uniform, x.shape, x, dtype),
    "randn_like": lambda mode, x, dtype=None: _made(mode.normal, x.shape, x, dtype),
    "randint": _randint,
    "randint_like": _randint_like,
    "randperm": lambda mode, n, dtype=None: mode.uniform([n]).argsort().to(dtype or torch.int64),
    "bernoulli": _bernoulli,
    "bernoulli_": lambda mode, x, p=0.5: _bernoulli(mode, x, p),
    "exponential_": _exponential,
    "uniform_": _uniform,
    "normal_": _normal,
    "normal": _normal_around,
    "multinomial": _multinomial,
    "random_": _random,
    "cauchy_": _cauchy,
    "log_normal_": _log_normal,
    "geometric_": _geometric,
}
