"""Products of cut values: matrix products, einsum, convolutions, attention.

Along which letter (see `product_letters`) chips share the work is decided by an operand that is cut, a weight before
others:

- a letter of the result that one operand has: the other is used whole (Megatron's column-wise weights),
- one that both have and the result too (batches, experts, heads, groups of channels): all are cut alike,
- one that both have and the result does not: what chips find is added up (row-wise weights).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from partitioner.capture.captured_graph import op_name
from partitioner.capture.products.product_letters import GROUPS, Product, operands_of, product_of
from partitioner.layout.cut_rules import CutCall, Rule, added
from partitioner.layout.cut_values import CutTensor, Value

aten = torch.ops.aten
SEQUENCE_DIMS = 2  # of attention's operands: positions and width, which stay whole
GENERAL = ("addmm", "baddbmm")  # what is added has any shape, and factors may stand before both


def product(call: CutCall) -> Any:
    """A product with a cut operand; None where it can be cut along no letter."""
    found = product_of(call.target, call.args, call.kwargs)
    if found is None:
        return None
    operands = operands_of(found, call.args)
    for letter, sections in _choices(found, operands):
        if letter != GROUPS or _are_apart(call, found, operands, sections):
            return _along(call, found, operands, letter, sections)
    return None


def _choices(found: Product, operands: tuple[Value, Value]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Letters along which an operand is cut, in the order of preference, and its sections there."""
    cut = [
        (o, letters[o.dim])
        for o, letters in zip(operands, found.letters, strict=True)
        if isinstance(o, CutTensor)
    ]
    for operand, letter in sorted(cut, key=lambda pair: (not pair[0].is_weight, -pair[0].shape.numel())):
        if letter is not None:
            yield letter, operand.sections


def _are_apart(
    call: CutCall, found: Product, operands: tuple[Value, Value], sections: tuple[int, ...]
) -> bool:
    """Whether groups of channels divide; where the channels consist of several sections, each is its own group."""
    channels = [o.shape[letters.index(GROUPS)] for o, letters in zip(operands, found.letters, strict=True)]
    is_depthwise = set(channels) == {found.groups} and call.group.is_even(sections)
    return found.groups % call.group.size == 0 and (len(sections) == 1 or is_depthwise)


def _along(
    call: CutCall, found: Product, operands: tuple[Value, Value], letter: str, sections: tuple[int, ...]
) -> Value:
    group, own = call.group, []
    for operand, letters in zip(operands, found.letters, strict=True):
        if letter not in letters:
            own.append(group.entered(group.whole(operand)))
            continue
        dim = letters.index(letter)
        if isinstance(operand, CutTensor) and not operand.is_weight and not group.is_even(operand.sections):
            # beyond its end a slice may hold anything, which must not meet a weight that is summed over
            operand = group.whole(operand)
        # groups of channels: as many in each operand and in the result, but of other widths
        is_wide = letter == GROUPS and len(sections) == 1
        own.append(group.at(operand, dim, (int(operand.shape[dim]),) if is_wide else sections))
    place = found.out.index(letter) if letter in found.out else None
    if letter == GROUPS and place is not None:
        width, channels = int(call.out.shape[place]), sum(sections)
        sections = tuple(section * width // channels for section in sections)
    bias = call.get(found.bias, "bias") if found.bias is not None else None
    if place is not None and bias is not None and op_name(call.target) not in GENERAL:
        at = place - _first_of_bias(found, bias)
        own_bias = group.at(bias, at, sections) if at >= 0 else group.entered(group.whole(bias))
        return CutTensor(_compute(call, found, own, own_bias), place, sections)
    made = _compute(call, found, own, None)
    result = group.total(made) if place is None else CutTensor(made, place, sections)
    return result if bias is None else _with_bias(call, found, result, bias)


def _first_of_bias(found: Product, bias: Value) -> int:
    """The dim of the result where those of the bias begin: channels, or the last ones."""
    slides = found.out[-1] is None
    channels = next((d for d, letter in enumerate(found.out) if letter in ("out", GROUPS)), 0)
    return channels if slides else len(found.out) - len(bias.shape)


def _compute(call: CutCall, found: Product, own: Sequence[torch.Tensor], bias: torch.Tensor | None) -> Any:
    one, other = own
    name = op_name(call.target)
    if name == "einsum":
        return call.run(call.args[0], [one, other])
    if name in GENERAL:
        return one @ other
    rest = map(call.group.whole, call.args[2:]) if name == "expert_mm" else call.args[2:]
    args = [one, other, *rest]
    if found.bias is not None:
        args[2:3] = [bias]
    if found.groups > 1:
        at = 8 if name == "convolution" else 6
        args[at] = found.groups * one.shape[found.letters[0].index(GROUPS)] // _whole_channels(call)
    return call.run(*args)


def _whole_channels(call: CutCall) -> int:
    x: Value = call.x
    return int(x.shape[-(len(call.args[1].shape) - 1)])


def _with_bias(call: CutCall, found: Product, result: Value, bias: Value) -> Value:
    """What is added to a product after it was made."""
    if op_name(call.target) in GENERAL:
        alpha, beta = call.kwargs.get("alpha", 1), call.kwargs.get("beta", 1)
        return added(call.group, _times(result, alpha), _times(bias, beta))
    slid = sum(letter is None for letter in found.out)
    whole = call.group.whole(bias)
    return added(call.group, result, whole.view(*whole.shape, *[1] * slid) if slid else whole)


def _times(value: Value, factor: float) -> Value:
    if factor == 1:
        return value
    return value.with_local(value.local * factor) if isinstance(value, CutTensor) else value * factor


def attention(call: CutCall) -> Any:
    """Heads (or samples) may be cut, alike in query, key and value; a mask that tells them apart, too."""
    query, key, value = call.args[:3]
    leader = next((o for o in (query, key, value) if isinstance(o, CutTensor)), None)
    rank = len(query.shape)
    if leader is None or leader.dim >= rank - SEQUENCE_DIMS or len(key.shape) != rank:
        return None
    place, parts = leader.dim, call.group
    length = query.shape[place]
    sections = leader.sections if leader.shape[place] == length else (length,)
    if not parts.is_even(sections) or any(o.shape[place] > length for o in (key, value)):
        return None
    own: list[torch.Tensor] = []
    for operand in (query, key, value):
        size = operand.shape[place]
        if size < length and size % parts.size == 0 and len(sections) == 1:
            own.append(parts.at(operand, place, (size,)))
            continue
        if size < length:  # fewer keys than chips: each chip has those of its queries
            operand = parts.whole(operand).repeat_interleave(length // size, place)
        own.append(parts.at(operand, place, sections))
    rest, named = list(call.args[3:]), dict(call.kwargs)
    mask = call.get(3, "attn_mask")
    if mask is not None:
        dim = place - (rank - len(mask.shape))
        is_apart = dim >= 0 and mask.shape[dim] > 1
        if is_apart and mask.shape[dim] != length:
            return None
        cut = call.group.at(mask, dim, sections) if is_apart else call.group.entered(call.group.whole(mask))
        rest[:1] = [cut]
        named.pop("attn_mask", None)
    return CutTensor(call.target(*own, *rest, **named), place, sections)


PRODUCT_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("linear", "mm", "matmul", "bmm", "mv", "addmm", "baddbmm", "einsum", "convolution", "expert_mm"),
        product,
    ),
    **{f"conv{d}d": product for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": product for d in (1, 2, 3)},
    "scaled_dot_product_attention": attention,
}
