"""Which operators a graph out of a file may call by name: pure functions of tensors that ATen has, and arithmetic on sizes.

A name never becomes an import or an attribute of anything but `torch.ops.aten`: what reads or writes files, swaps the memory
behind a tensor, or belongs to another library is refused, and with it the graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from initaudit.errors import LimitExceeded, UnsupportedOperator
from initaudit.load.spans import show

# Operators that are neither pointwise, a reduction, a copying view nor of the core set: those of torch.nn and of reshaping. An
# operator stands here if it checks what it is given by itself, or is checked by `sound.check`. Whatever trusts its caller does
# not: kernels of a backward pass, aten::_reshape_alias, fractional pooling, packed sequences, anti-aliased resizing write or
# read beyond their tensors; and aten::save, from_file or manual_seed have nothing to do with a graph.
_NAMES = """
linear bilinear matmul mm bmm mv dot vdot addmm baddbmm addbmm addmv addr inner outer ger tensordot einsum conv1d conv2d
conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc convolution _convolution _convolution_mode embedding
one_hot lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell cdist _cdist_forward _euclidean_dist
pairwise_distance cosine_similarity batch_norm _batch_norm_impl_index instance_norm layer_norm native_layer_norm group_norm
native_group_norm rms_norm norm frobenius_norm _weight_norm linalg_vector_norm linalg_norm linalg_matrix_norm linalg_matmul
linalg_vecdot linalg_inv inverse linalg_solve linalg_cholesky linalg_qr linalg_det det slogdet linalg_cross cross trace
softmax log_softmax _softmax _log_softmax _safe_softmax scaled_dot_product_attention glu prelu relu6 selu celu silu mish
rrelu softplus softshrink hardshrink hardsigmoid hardswish log_sigmoid threshold logit dropout feature_dropout alpha_dropout
feature_alpha_dropout native_dropout max_pool1d max_pool2d max_pool3d max_pool1d_with_indices avg_pool1d avg_pool2d
avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
adaptive_max_pool3d max_unpool2d max_unpool3d pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
replication_pad1d replication_pad2d replication_pad3d im2col col2im unfold pixel_shuffle pixel_unshuffle channel_shuffle
upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d grid_sampler
grid_sampler_2d grid_sampler_3d affine_grid_generator view view_as reshape reshape_as _unsafe_view flatten unflatten ravel
squeeze unsqueeze t numpy_T mT transpose swapaxes swapdims movedim moveaxis permute adjoint expand expand_as broadcast_to
broadcast_tensors sum_to_size repeat tile repeat_interleave roll rot90 flip fliplr flipud chunk unsafe_chunk tensor_split
split split_with_sizes unsafe_split unsafe_split_with_sizes hsplit vsplit dsplit unbind narrow select slice diag diag_embed
diagonal diagonal_scatter slice_scatter select_scatter tril triu tril_indices triu_indices stack hstack vstack dstack
column_stack row_stack cat concat concatenate meshgrid atleast_1d atleast_2d atleast_3d block_diag index index_select
index_add index_copy index_fill index_put _unsafe_index _unsafe_index_put gather take scatter scatter_add scatter_reduce
masked_fill masked_scatter masked_select where nonzero argwhere sort argsort topk msort kthvalue median nanmedian mode
cummax cummin cumsum cumprod logcumsumexp logsumexp max min aminmax amax amin argmax argmin all any sum mean prod var std
var_mean std_mean nansum nanmean count_nonzero quantile searchsorted bucketize isin isclose allclose equal
unique_consecutive diff trapezoid to _to_copy type_as contiguous clone detach alias lift lift_fresh lift_fresh_copy copy
zero fill fill_diagonal item is_nonzero _cast_Byte _cast_Char _cast_Double _cast_Float _cast_Half _cast_Int _cast_Long
_cast_Short real imag complex conj _conj resolve_conj resolve_neg view_as_real view_as_complex polar angle fft_fft fft_ifft
fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_fftshift
fft_ifftshift fft_fftfreq fft_rfftfreq stft istft hann_window hamming_window zeros ones full eye empty linspace logspace
arange range tensor as_tensor scalar_tensor rand randn randint randperm zeros_like ones_like full_like empty_like rand_like
randn_like randint_like new_zeros new_ones new_full new_empty bernoulli normal uniform exponential multinomial mse_loss
l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits cross_entropy_loss nll_loss
nll_loss_nd kl_div size stride numel dim sym_size sym_stride sym_numel is_floating_point is_complex is_same_size
_shape_as_tensor sym_constrain_range sym_constrain_range_for_size _assert_tensor_metadata _assert_scalar _assert_async
"""
_LISTED = frozenset(_NAMES.split())
_LOGIC = frozenset(f"__{name}__" for name in ("and", "or", "xor", "iand", "ior", "ixor", "lshift", "rshift"))
_TAGS = (torch.Tag.pointwise, torch.Tag.reduction, torch.Tag.view_copy)
# What torch.export writes for arithmetic on symbolic sizes; no power, which can take for ever
_ON_NUMBERS: Mapping[str, Callable[..., Any]] = {
    **{
        f"_operator.{function.__name__}": function
        for function in (
            *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.neg),
            *(operator.pos, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_),
            *(operator.or_, operator.xor, operator.not_, operator.getitem, operator.index),
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "sqrt", "trunc")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_not", "sym_int", "sym_float", "sym_max", "sym_min", "sym_ite", "sym_sqrt", "sym_sum")
    },
}


def exported_target(target: str) -> Callable[..., Any]:
    """The function that an exported graph calls `target`; raises UnsupportedOperator for any that is not allowed."""
    if target in _ON_NUMBERS:
        return _ON_NUMBERS[target]
    parts = target.removeprefix("torch.ops.").split(".")
    if target.startswith("torch.ops.") and len(parts) == 3 and parts[0] == "aten":
        return overload(parts[1], parts[2])
    raise UnsupportedOperator(show(target), "an operator that a graph out of a file may not call")


def packet(name: str) -> torch._ops.OpOverloadPacket:
    """`torch.ops.aten.NAME`; raises UnsupportedOperator for a name that is not allowed."""
    listed = _base(name) in _LISTED or name in _LOGIC
    if listed or (name.isidentifier() and not name.startswith("_")):
        found = getattr(torch.ops.aten, name, None)
        if isinstance(found, torch._ops.OpOverloadPacket) and (listed or _tagged(found)):
            return found
    raise UnsupportedOperator(f"aten.{show(name)}", "an operator that a graph out of a file may not call")


def _base(name: str) -> str:
    """An operator in place does to its first argument what its namesake computes."""
    return name[:-1] if name.endswith("_") else name


def _tagged(found: torch._ops.OpOverloadPacket) -> bool:
    """Whether every form works element by element, over whole axes, or only moves elements: torch's iterators check those."""
    if "backward" in found.__name__:
        return False
    forms = [getattr(found, form) for form in found.overloads()]  # type: ignore[no-untyped-call]
    return bool(forms) and any(any(tag in form.tags for tag in _TAGS) for form in forms)


def overload(name: str, variant: str) -> torch._ops.OpOverload:
    """`torch.ops.aten.NAME.VARIANT`; raises UnsupportedOperator for one that is refused or unknown, or writes to an output."""
    found = packet(name)
    if variant in found.overloads():  # type: ignore[no-untyped-call]
        chosen: torch._ops.OpOverload = getattr(found, variant)
        if not any(argument.is_out for argument in chosen._schema.arguments):
            return chosen
    raise UnsupportedOperator(f"aten.{show(name)}.{show(variant)}", "an operator that a graph out of a file may not call")


def bounded(function: Callable[..., Any], most: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`function(*args, **kwargs)` unless it would make more than `most` elements; raises LimitExceeded.

    The size is found on torch's meta device, where nothing is allocated; operators that have no such kernel make no more than
    they are given.
    """
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and not _hollow((args, kwargs)):
        try:
            hollow = function(*_on_meta(args), **_on_meta(dict(kwargs)))
        except (NotImplementedError, RuntimeError, TypeError):
            hollow = None
        for leaf in pytree.tree_leaves(hollow):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > most:
                raise LimitExceeded(str(function), f"{leaf.numel()} elements in one output", f"at most {most}")
    return function(*args, **kwargs)


def _hollow(value: Any) -> bool:
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return bool(tensors) and any(type(t) not in (torch.Tensor, torch.nn.Parameter) or t.is_meta for t in tensors)


def _on_meta(value: Any) -> Any:
    def moved(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("meta")
        return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(moved, value)
