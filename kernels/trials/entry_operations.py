"""Entry operations: whether a step computes every entry of a parameter from entries at the same place alone.

Only then may parameters be stepped on end to end and in shards. A trial (`optimizer_trials`) sees a few steps; what a
class of the user's does later is watched while it does it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as trees
from torch.utils._python_dispatch import TorchDispatchMode

BY_ENTRIES = (  # beginnings of names, of operations that torch does not mark so
    "zeros", "ones", "full", "empty", "new_", "scalar_tensor", "lift_fresh", "arange",  # with no entry read
    "copy", "clone", "_to_copy", "detach", "alias", "fill", "zero", "masked_fill", "_conj", "resolve_",
    "_foreach_", "_fused_",
)  # fmt: skip
REDUCING = ("_foreach_norm", "_foreach_max")
OF_ANY_SHAPE = frozenset(  # what may be asked of a tensor, as the answer says nothing of its shape
    ("dtype", "device", "get_device", "layout", "element_size", "itemsize", "requires_grad", "retains_grad", "is_leaf",
     "grad_fn", "is_complex", "is_floating_point", "is_signed", "is_inference", "is_conj", "is_neg", "has_names",
     "is_sparse", "is_sparse_csr", "is_mkldnn", "is_quantized", "is_nested", "is_meta", "is_cpu", "is_cuda", "is_xla",
     "is_mps", "is_hpu", "is_xpu", "is_ipu", "is_vulkan", "is_mtia", "is_maia", "result_type", "is_tensor", "__hash__",
     "__class__")
)  # fmt: skip


class StepWatch(TorchDispatchMode):
    """Notes what a step does that is not by entries, and what it draws at random, by the names of operations; and what
    it asks of tensors that tells their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing: set[str] = set()
        self.drawing: set[str] = set()
        self._questions = _Questions(self.mixing)

    def __enter__(self) -> Self:
        self._questions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:  # noqa: PYI036  (as in torch)
        super().__exit__(*raised)
        self._questions.__exit__(*raised)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = str(func._schema.name).partition("::")[2]
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drawing.add(name)
        if not _is_by_entries(func, name, args, kwargs or {}):
            self.mixing.add(name)
        return func(*args, **(kwargs or {}))


class _Questions(TorchFunctionMode):
    """Notes what is asked of tensors of more than one entry, and is no tensor."""

    def __init__(self, mixing: set[str]) -> None:
        super().__init__()
        self.mixing = mixing

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(not isinstance(each, torch.Tensor) for each in trees.tree_leaves(made) if each is not None):
            name = (
                (resolve_name(func) or getattr(func, "__name__", ""))
                .removesuffix(".__get__")
                .rpartition(".")[2]
            )
            asked = (v for v in trees.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor))
            if name not in OF_ANY_SHAPE and any(torch.Tensor.numel(value) > 1 for value in asked):
                self.mixing.add(name)
        return made


def _is_by_entries(func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    is_known = name.startswith(BY_ENTRIES) and not name.startswith(REDUCING)
    if torch.Tag.pointwise in func.tags or is_known:
        return True
    values = (v for v in trees.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor))
    return all(value.numel() <= 1 for value in values)  # counts and the like
