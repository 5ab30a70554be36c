"""Products by letters: for the dims of both operands and of the result of a matrix product, an einsum, a convolution.

Dims of one letter run together, as in einsum. A letter that the result lacks is summed over. `GROUPS` stands for the
groups of a convolution together with the channels in them. A dim that is repeated for the other operand, and those
that a convolution slides over, have no letter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from partitioner.capture.captured_graph import op_name

Letters: TypeAlias = tuple[str | None, ...]
GROUPS = "groups"


@dataclass(frozen=True, slots=True)
class Product:
    """`places`: of both operands among the arguments (of einsum: among its operands); `bias`: of what is added.

    `groups`: how many slices `GROUPS` can be cut into.
    """

    places: tuple[int, int]
    letters: tuple[Letters, Letters]
    out: Letters
    bias: int | None = None
    groups: int = 1

    @property
    def shared(self) -> frozenset[str]:
        """Letters that both operands have."""
        return frozenset(filter(None, self.letters[0])) & frozenset(filter(None, self.letters[1]))


def product_of(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product | None:
    """The letters of an operation (arguments with `shape`), or None if it is no product that is known."""
    make = _MAKERS.get(op_name(target))
    return make(args, kwargs) if make is not None else None


def operands_of(product: Product, args: Sequence[Any]) -> tuple[Any, Any]:
    """Both operands among the arguments."""
    holder = args[1] if isinstance(args[0], str) else args
    return holder[product.places[0]], holder[product.places[1]]


def _rows(x: Any) -> Letters:
    return tuple(f"row{d}" for d in range(len(x.shape) - 1))


def _linear(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product:
    rows = _rows(args[0])
    out = ("out",) if len(args[1].shape) > 1 else ()
    return Product((0, 1), ((*rows, "in"), (*out, "in")), (*rows, *out), 2)


def _matmul(first: int, bias: int | None = None) -> Callable[..., Product]:
    def make(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product:
        a, b = (tuple(args[first + n].shape) for n in range(2))
        around = max(len(a), len(b)) - 2

        def batches(shape: tuple[int, ...]) -> Letters:
            names = range(around - (len(shape) - 2), around)
            return tuple(f"batch{n}" if size > 1 else None for n, size in zip(names, shape[:-2], strict=True))

        left: Letters = (*batches(a), "row", "in") if len(a) > 1 else ("in",)
        right: Letters = (*batches(b), "in", "out") if len(b) > 1 else ("in",)
        outer = tuple(f"batch{n}" for n in range(around))
        out = (*outer, *(("row",) if len(a) > 1 else ()), *(("out",) if len(b) > 1 else ()))
        return Product((first, first + 1), (left, right), out, bias)

    return make


def _experts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product:
    """Rows, each by the matrix of its expert (rows and their experts' numbers stay together, whole)."""
    return Product((0, 1), ((None, "in"), (None, "in", "out")), (None, "out"))


def _einsum(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product | None:
    equation, operands = args[0].replace(" ", ""), args[1]
    inputs, _, out = equation.partition("->")
    terms = inputs.split(",")
    simple = all(len(set(term)) == len(term) and "." not in term for term in (*terms, out))
    if len(operands) != 2 or "->" not in equation or not simple or {*terms[0], *terms[1]} < {*out}:
        return None
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        for letter, size in zip(term, operand.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))

    def of(term: str, shape: Sequence[int]) -> Letters:
        return tuple(letter if n == sizes[letter] else None for letter, n in zip(term, shape, strict=True))

    one, other = (of(t, o.shape) for t, o in zip(terms, operands, strict=True))
    alone = ({*one} ^ {*other}) - {*out, None}  # summed over within one operand
    if alone:
        return None
    return Product((0, 1), (one, other), tuple(out))


def _convolution(args: Sequence[Any], kwargs: Mapping[str, Any], *, transposed: bool, at: int) -> Product:
    x, weight = args[0], args[1]
    slid: Letters = (None,) * (len(weight.shape) - 2)
    samples: Letters = ("sample",) if len(x.shape) == len(weight.shape) else ()
    groups = int(args[at] if len(args) > at else kwargs.get("groups", 1))
    if groups > 1:
        own: Letters = (GROUPS, None)
        return Product(
            (0, 1), ((*samples, GROUPS, *slid), (*own, *slid)), (*samples, GROUPS, *slid), 2, groups
        )
    kernel = ("in", "out") if transposed else ("out", "in")
    return Product((0, 1), ((*samples, "in", *slid), (*kernel, *slid)), (*samples, "out", *slid), 2)


def _plain(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product:
    return _convolution(args, kwargs, transposed=False, at=6)


def _transposed(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product:
    return _convolution(args, kwargs, transposed=True, at=6)


def _either(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product:
    return _convolution(args, kwargs, transposed=bool(args[6]), at=8)


_MAKERS: Mapping[str, Callable[..., Product | None]] = {
    "linear": _linear, "mm": _matmul(0), "matmul": _matmul(0), "bmm": _matmul(0),
    "mv": _matmul(0), "addmm": _matmul(1, 0), "baddbmm": _matmul(1, 0), "einsum": _einsum, "convolution": _either,
    "expert_mm": _experts,
    **{f"conv{d}d": _plain for d in (1, 2, 3)}, **{f"conv_transpose{d}d": _transposed for d in (1, 2, 3)},
}  # fmt: skip
