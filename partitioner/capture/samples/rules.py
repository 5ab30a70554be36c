"""Rules: from how an operation's operands spread to how its result does, or to what must be whole first.

A rule never guesses: what it does not know raises NeedsWhole, which the caller answers by adding up, by gathering, or
with a refusal. Families of operators are told by name; everything else that torch marks as pointwise is. Operators
without a rule that torch can express by others are taken apart (`split_samples`).
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch

from partitioner.capture.captured_graph import op_name
from partitioner.capture.samples import arithmetic_rules as arithmetic
from partitioner.capture.samples import index_rules as indexing
from partitioner.capture.samples import shape_rules as shapes
from partitioner.capture.samples.spread import SAME, NeedsWhole, OperatorCall, Same, Spread

Rule: TypeAlias = Callable[[OperatorCall], Spread]

FAMILIES: Mapping[Rule, str] = {
    arithmetic.pointwise: """
        where masked_fill dropout to _to_copy clone contiguous detach alias copy fill lift_fresh_copy
        log_sigmoid hardswish hardsigmoid softsign relu6 bitwise_not logical_not nan_to_num zeros_like ones_like
        full_like empty_like lift_fresh isclose _softmax_backward_data relu selu celu threshold real imag conj
        _prelu_kernel resolve_conj resolve_neg polar complex isfinite isnan float_power lerp round""",
    arithmetic.elementwise_loss: """
        mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div
        soft_margin_loss""",
    arithmetic.reduction: """
        sum mean amax amin max min any all prod logsumexp linalg_vector_norm norm var std var_mean std_mean argmax
        argmin nansum count_nonzero median""",
    arithmetic.along_dim: """
        softmax _safe_softmax log_softmax _softmax _log_softmax cumsum cumprod cummax cummin logcumsumexp sort argsort
        topk kthvalue mode flip roll glu _fft_c2c _fft_r2c _fft_c2r""",
    arithmetic.over_trailing: "layer_norm native_layer_norm rms_norm",
    arithmetic.bilinear: "bilinear",
    arithmetic.trilinear: "_trilinear",
    arithmetic.einsum: "einsum",
    arithmetic.batch_norm: "batch_norm",
    arithmetic.instance_norm: "instance_norm",
    arithmetic.matmul: "matmul mm bmm linear addmm mv dot baddbmm",
    arithmetic.samples_first: """
        conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d
        max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices max_pool1d_with_indices
        group_norm native_group_norm upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d
        upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d
        pixel_shuffle pixel_unshuffle im2col col2im grid_sampler grid_sampler_2d grid_sampler_3d reflection_pad1d
        reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d channel_shuffle
        _adaptive_avg_pool2d _adaptive_avg_pool3d""",
    arithmetic.attention: "scaled_dot_product_attention",
    arithmetic.expert_product: "expert_mm",
    arithmetic.recurrent: "lstm gru rnn_tanh rnn_relu",
    arithmetic.cross_entropy: "cross_entropy_loss nll_loss nll_loss_nd nll_loss2d",
    shapes.matrices: """
        inverse linalg_inv linalg_inv_ex linalg_det det logdet _linalg_det linalg_slogdet slogdet _linalg_slogdet
        cholesky linalg_cholesky linalg_cholesky_ex cholesky_inverse cholesky_solve linalg_eigh linalg_eigvalsh
        _linalg_eigh linalg_eig linalg_eigvals linalg_svd linalg_svdvals _linalg_svd svd linalg_qr qr linalg_pinv
        pinverse linalg_matrix_exp matrix_exp linalg_lu linalg_lu_factor linalg_lu_factor_ex linalg_lu_solve
        linalg_solve linalg_solve_ex _linalg_solve_ex linalg_solve_triangular triangular_solve linalg_matrix_power
        matrix_power linalg_householder_product linalg_ldl_factor""",
    shapes.reshaping: "view reshape _unsafe_view flatten unflatten unsqueeze squeeze atleast_1d atleast_2d",
    shapes.permuting: "transpose permute t swapaxes swapdims",
    shapes.expanding: "expand broadcast_to repeat repeat_interleave",
    shapes.slicing: """
        slice select narrow split split_with_sizes chunk tensor_split unbind diagonal unfold unsafe_chunk
        unsafe_split""",
    shapes.joining: "cat stack concat",
    shapes.padding: "constant_pad_nd pad",
    shapes.item: "getitem",
    shapes.writing: "slice_scatter select_scatter",
    shapes.views_of_numbers: "view_as_real view_as_complex",
    shapes.masking_corners: "triu tril",
    shapes.creation: """
        zeros ones full empty scalar_tensor arange linspace eye tril_indices triu_indices new_zeros new_ones new_full
        new_empty""",
    indexing.embedding: "embedding",
    indexing.index: "index _unsafe_index",
    indexing.index_put: "index_put _unsafe_index_put",
    indexing.index_select: "index_select",
    indexing.gather: "gather",
    indexing.scatter: "scatter scatter_add scatter_reduce",
    indexing.index_add: "index_add index_copy index_fill",
    indexing.histogram: "histc",
    indexing.one_hot: "one_hot",
    indexing.ctc: "ctc_losses",
    indexing.keyed: "keyed_uniform",
    indexing.searching: "bucketize searchsorted",
}  # fmt: skip
BY_NAME: Mapping[str, Rule] = {name: rule for rule, names in FAMILIES.items() for name in names.split()}


def rule_of(target: object) -> Rule | None:
    """The rule of an operator, if there is one."""
    found = BY_NAME.get(op_name(target))
    if found is None and isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return arithmetic.pointwise
    return found


def spread_of(call: OperatorCall) -> Spread:
    """How the result of an operation spreads. Raises NeedsWhole."""
    rule = rule_of(call.node.target)
    if rule is indexing.keyed:
        return indexing.keyed(call)
    if all(isinstance(call.spread(n), Same) for n in call.operands):
        if call.has_grown or _same_shape(call):
            return SAME
        if rule not in (shapes.creation, shapes.expanding):
            raise NeedsWhole(())
        return shapes.creation(call)
    if rule is None:
        raise call.all_whole()
    result = rule(call)
    if not isinstance(result, Same) and not shapes.has_parts(call, result):
        raise call.all_whole()
    if isinstance(result, Same) and not _same_shape(call):
        raise call.all_whole()
    return result


def _same_shape(call: OperatorCall) -> bool:
    value = call.node.meta["val"]
    return tuple((value[0] if isinstance(value, tuple | list) else value).shape) == call.out
