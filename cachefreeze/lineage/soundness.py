"""Facts about functions, kernels and modules of torch: which read, write, draw or mix rows."""

import functools
import random
import sys
import types
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from cachefreeze.lineage import blocks
from cachefreeze.lineage.structure import kind_is

Tensor = torch.Tensor


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Functions that read only metadata of a tensor. A late value answers them itself.
METADATA_NAMES = _words(
    """
    size dim ndimension stride storage_offset numel nelement element_size is_contiguous
    is_floating_point is_complex is_signed is_conj is_neg is_inference get_device has_names
    __len__ __hash__ __instancecheck__ is_sparse is_nested dim_order
    """
)
METADATA_PROPERTIES = _words(
    """
    shape dtype device layout ndim requires_grad is_leaf is_cuda is_cpu is_meta is_mps is_xpu
    is_sparse is_sparse_csr is_quantized is_nested is_mkldnn is_vulkan names itemsize nbytes
    is_xla is_ipu is_hpu is_mtia is_maia is_ort _backward_hooks output_nr
    """
)
# Functions that ask for gradients of a tensor. Work that depends on this tensor counts as trained.
_GRADIENT_NAMES = frozenset(
    ["retain_grad", "register_hook", "register_post_accumulate_grad_hook", "backward"]
)
# Functions without tensor results that depend on shapes and types alone.
_SHAPE_ONLY_NAMES = _words(
    """
    broadcast_shapes result_type can_cast promote_types is_grad_enabled is_tensor is_storage
    is_inference_mode_enabled get_default_dtype iinfo finfo compiled_with_cxx11_abi
    """
)
# Functions that return the memory of a tensor. Later writes to this memory are not seen.
EXPOSING_NAMES = _words(
    """
    numpy __array__ data_ptr untyped_storage storage _typed_storage __dlpack__
    __array_interface__ __cuda_array_interface__.read
    """
)
SWITCH_NAMES = frozenset(["_set_grad_enabled", "set_grad_enabled"])
# Kernels that write to arguments although their schema does not say so: positions of these
# arguments, and position of the flag under which they write (-1 for always).
_UNSAID_WRITES: dict[str, tuple[tuple[int, ...], int]] = {
    "aten::native_batch_norm": ((3, 4), 5),
    "aten::cudnn_batch_norm": ((3, 4), 5),
    "aten::miopen_batch_norm": ((3, 4), 5),
    "aten::_batch_norm_impl_index": ((3, 4), 5),
    "aten::batch_norm": ((3, 4), 5),
    "aten::_batch_norm_with_update": ((3, 4), -1),
    "aten::_batch_norm_with_update_functional": ((3, 4), -1),
}
_COLLECTIVES = ("c10d::", "_c10d_functional::", "c10d_functional::", "_c10d_functional_autograd::")
# Kernels whose result for a row depends on other rows, whichever axis the rows are in.
_MIXING = _words(
    """
    quantized::linear_dynamic quantized::linear_dynamic_fp16 quantized::linear_relu_dynamic
    quantized::conv2d_dynamic quantized::quantized_lstm_cell_dynamic aten::quantized_lstm
    aten::_choose_qparams_per_tensor aten::choose_qparams_optimized
    """
)
# Kernels beside those that treat each element alone, and beside views. On one thread they give each
# row the same bits at any place in the batch, beside any other rows, or so many rows have other
# bits that two compared batches show it. `blocks` knows those in which few have.
_STEADY = _words(
    """
    convolution _convolution mkldnn_convolution mm addmm bmm baddbmm linear native_batch_norm
    _native_batch_norm_legit _native_batch_norm_legit_no_training batch_norm native_layer_norm
    native_group_norm _fused_rms_norm _native_multi_head_attention
    _scaled_dot_product_flash_attention_for_cpu _softmax _log_softmax _safe_softmax hardswish
    glu max_pool1d max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d mean sum amax amin all any _local_scalar_dense
    upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa im2col
    constant_pad_nd reflection_pad2d replication_pad2d embedding index index_select gather cat
    stack clone copy _to_copy _unsafe_view _reshape_alias as_strided lift_fresh repeat roll
    flip tril triu pixel_shuffle channel_shuffle empty empty_like empty_strided new_empty zeros
    zeros_like new_zeros ones ones_like new_ones full full_like new_full fill zero arange
    scalar_tensor
    """
)
_STEADY_TYPES = frozenset((torch.float32, torch.float64))
# Modules of torch that have a fast path in eval mode, and do not take it below a function mode.
_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
_ASKED = "has_torch_function"


def _descriptors(names: Iterable[str]) -> set[Any]:
    found = (getattr(Tensor, name, None) for name in names)
    return {one.__get__ for one in found if one is not None and hasattr(one, "__get__")}


METADATA: frozenset[Any] = frozenset(
    {getattr(Tensor, name) for name in METADATA_NAMES if callable(getattr(Tensor, name, None))}
    | {getattr(torch, name) for name in METADATA_NAMES if callable(getattr(torch, name, None))}
    | {getattr(torch, name) for name in _SHAPE_ONLY_NAMES if callable(getattr(torch, name, None))}
    | _descriptors(METADATA_PROPERTIES)
)
ITERATE = Tensor.__iter__
IS_LEAF = Tensor.is_leaf.__get__  # type: ignore[attr-defined]


def asks_gradients(name: str) -> bool:
    """Returns whether a function asks for gradients of a tensor."""
    return name in _GRADIENT_NAMES


def is_switch(name: str) -> bool:
    """Returns whether a function switches gradients on or off. Such a function must always run."""
    return name in SWITCH_NAMES


class Kernel:
    """Properties of a kernel, from its schema and its name.

    Args:
        overload: Operator overload, as a dispatch mode gets it.

    Attributes:
        collective: Whether the kernel exchanges tensors with other processes.
        mixes: Whether the result for a row depends on other rows, whichever axis the rows are in.
        may_move_bits: Whether the last bits of a row may depend on its place in the batch.
        steady: Whether a row was seen to have the same bits at any place in the batch, on one
            thread of a CPU.
        may_draw: Whether the kernel may draw random numbers. Also true for kernels that are not
            torch's.
    """

    def __init__(self, overload: Any) -> None:
        schema = overload._schema
        name = schema.name
        self.collective = name.startswith(_COLLECTIVES)
        self.mixes = name in _MIXING
        self.may_move_bits = blocks.may_move_bits(overload)
        self.steady = name.startswith("aten::") and (
            blocks.name_of(overload) in _STEADY
            or overload.is_view
            or torch.Tag.pointwise in overload.tags
        )
        self.may_draw = torch.Tag.nondeterministic_seeded in overload.tags or not name.startswith(
            ("aten::", "prim::")
        )
        self._written = [
            (place, argument.name)
            for place, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self._unsaid = _UNSAID_WRITES.get(name)
        self._shapeless = torch.Tag.dynamic_output_shape in overload.tags
        self._index = overload is torch.ops.aten.index.Tensor

    def is_steady(self, output: Any) -> bool:
        """Returns whether a row of the result has the same bits at any place, as far as is known.

        Args:
            output: Result of the kernel.
        """
        made = _tensors(output)
        return self.steady and all(
            one.device.type == "cpu"
            and (one.dtype in _STEADY_TYPES or not (one.is_floating_point() or one.is_complex()))
            for one in made
        )

    def written(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        """Returns the tensors that a call writes to."""
        found: list[Tensor] = []
        for place, name in self._written:
            found += _tensors(args[place] if place < len(args) else kwargs.get(name))
        if self._unsaid is not None:
            places, flag = self._unsaid
            if flag < 0 or (len(args) > flag and args[flag]):
                for place in places:
                    found += _tensors(args[place]) if place < len(args) else []
        if self.collective:
            for value in (*args, *kwargs.values()):
                found += _tensors(value)
        return found

    def shape_follows_data(self, args: Sequence[Any]) -> bool:
        """Returns whether the shape of the result depends on the elements of the arguments."""
        if self._index:
            # A mask selects a number of elements that depends on its elements. Other indices do
            # not.
            return any(one is not None and one.dtype in _MASKS for one in args[1])
        return self._shapeless


_MASKS = (torch.bool, torch.uint8)
kernel = functools.cache(Kernel)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def holds_generator(values: Iterable[Any]) -> bool:
    """Returns whether a random generator is among some arguments."""
    return any(kind_is(type(value), torch.Generator) for value in values)


def torch_generators() -> tuple[Any, ...]:
    """Returns the states of torch's default generators."""
    states: list[Any] = [torch.default_generator.get_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += [generator.get_state() for generator in torch.cuda.default_generators]
    return tuple(states)


def same_generators(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Returns whether two results of `torch_generators` are equal, so that nothing was drawn."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


def python_generators() -> tuple[Any, ...]:
    """Returns the states of the default generators of Python and numpy."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state(legacy=False) if numpy is not None else None
    if state is not None:
        state = (state["state"]["key"].tobytes(), state["state"]["pos"], state["has_gauss"])
    return random.getstate(), state


def is_opaque(module: nn.Module) -> bool:
    """Returns whether a module is traced as one operation, as its inside must not be followed.

    This holds for compiled and scripted modules, and for modules whose code asks whether a function
    mode is on. Torch's attention and transformer encoders leave their fast path then, and their
    results have other bits.
    """
    if isinstance(module, torch.jit.ScriptModule) or is_compiled(module):
        return True
    if isinstance(module, _FAST_PATH) and type(module).forward in _FAST_FORWARDS:
        return not module.training
    return _asks(type(module))


def is_compiled(module: nn.Module) -> bool:
    """Returns whether a module or its `forward` method is compiled by `torch.compile`."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:
        return False
    forward = module.forward
    if getattr(forward, "_torchdynamo_disable", False):
        return False
    return isinstance(module, dynamo.OptimizedModule) or hasattr(
        forward, "_torchdynamo_orig_callable"
    )


_FAST_FORWARDS = {kind.forward for kind in _FAST_PATH}
_asking: dict[tuple[type, Any], bool] = {}


def _asks(kind: type[nn.Module]) -> bool:
    forward = kind.forward
    key = (kind, forward)
    if key not in _asking:
        code = getattr(forward, "__code__", None)
        _asking[key] = code is not None and _names(code, _ASKED)
    return _asking[key]


def _names(code: types.CodeType, beginning: str) -> bool:
    if any(name.startswith(beginning) for name in code.co_names):
        return True
    return any(_names(one, beginning) for one in code.co_consts if isinstance(one, types.CodeType))


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Returns whether a hook runs when the module is called. Global hooks count."""
    return any(getattr(module, kind) for kind in HOOKS) or bool(shared_hooks())


def shared_hooks() -> tuple[int, ...]:
    """Returns the numbers of the hooks that run for all modules."""
    kinds = (getattr(nn.modules.module, f"_global{kind}") for kind in HOOKS)
    return tuple(chain.from_iterable(kinds))


def holds_own_generator(module: nn.Module) -> bool:
    """Returns whether an attribute of a module is a random generator. Traces do not watch these."""
    numpy = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (random.Random, torch.Generator)
    if numpy is not None:
        kinds += (numpy.random.Generator, numpy.random.RandomState)
    return any(kind_is(type(value), kinds) for value in vars(module).values())


def is_torchs_own(module: nn.Module) -> bool:
    """Returns whether the class of a module is torch's.

    Such modules draw no Python numbers and keep no lists.
    """
    return type(module).__module__.startswith("torch.nn.modules.")


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Returns the attributes of a module, without its parameters, buffers, parts and hooks."""
    return {name: value for name, value in vars(module).items() if name not in PARTS}


PARTS = _words(
    """
    _parameters _buffers _modules _non_persistent_buffers_set _backward_pre_hooks
    _backward_hooks _is_full_backward_hook _forward_hooks _forward_hooks_with_kwargs
    _forward_hooks_always_called _forward_pre_hooks _forward_pre_hooks_with_kwargs
    _state_dict_hooks _state_dict_pre_hooks _load_state_dict_pre_hooks
    _load_state_dict_post_hooks training
    """
)


def attributes_changed(before: dict[str, Any], sizes: dict[str, int], module: nn.Module) -> str:
    """Returns the name of an attribute that has changed, or an empty string.

    Args:
        before: Earlier result of `plain_attributes`.
        sizes: Earlier result of `sizes_of` for these attributes.
        module: Module to compare.
    """
    after = plain_attributes(module)
    for name in before.keys() | after.keys():
        if name not in before or name not in after or before[name] is not after[name]:
            return name
    changed = sizes_of(after)
    return next((name for name in sizes if sizes[name] != changed.get(name)), "")


def sizes_of(attributes: dict[str, Any]) -> dict[str, int]:
    """Returns a hash of the items of each attribute that is a list, set or dictionary."""
    kinds = (list, dict, set)
    return {
        name: hash(tuple(map(id, value.values() if isinstance(value, dict) else value)))
        for name, value in attributes.items()
        if isinstance(value, kinds)
    }
