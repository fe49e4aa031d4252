"""Results with the bits of eager: which ops of a graph Inductor may compile, so that ATen's own kernels run the rest.

Arithmetic that IEEE 754 defines to the last bit comes out the same whoever does it. A sum depends on its order, and
exp, tanh or erf on the library: only the kernel that eager calls gives eager's bits.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, cast

import torch
from torch.fx import Node

from .._basics.nodes import op_of, op_or_none, tensor_of, tensor_or_none
from .._torch.capture import at_least
from .._torch.inductor import functional_op

aten, prims = torch.ops.aten, torch.ops.prims

# No torch from 2.11 to 2.15 lacks any of these.
OPTIONS: dict[str, Any] = {
    "fallback_by_default": True,  # call ATen's kernels for all that is not marked
    "emulate_precision_casts": True,  # round to 16 bits where eager does; in Triton, also no fused multiply-add
    "eager_numerics.division_rounding": True,
    "eager_numerics.disable_ftz": True,
    "use_fast_math": False,
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_unsafe_math_opt_flag": False,
    # Passes that leave out what seems to change nothing, such as a cast there and back, and replace patterns of ops.
    "use_joint_graph_passes": False,
    "pattern_matcher": False,
}

# Between two ops in C++ code, torch 2.11 and 2.12 do not round to 16 bits; in Triton their reciprocal is approximate.
ROUNDS_IN_CPP = ACCURATE_RECIPROCAL = torch.__version__ >= "2.13"

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_MOVES = {aten.cat, aten.clone, aten.stack, aten.index, aten.gather, aten.embedding}
_MAKES = {aten.full, aten.zeros, aten.ones, aten.scalar_tensor}
_CONVERTS = {aten._to_copy, prims.convert_element_type}
_CHOOSES = {aten.abs, aten.where, aten.masked_fill, aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge}
_CLAMPS = {aten.clamp, aten.clamp_min, aten.clamp_max}
_ROUNDS = {aten.add, aten.sub, aten.mul, aten.div, aten.sqrt, aten.rsqrt, aten.reciprocal, aten.pow}


def is_exact(node: Node) -> bool:
    """Whether Inductor's code for an op must give ATen's bits, but for the sign and payload of a NaN."""
    op = op_of(node)
    packet = functional_op(op).overloadpacket
    if op.is_view or isinstance(node.meta["val"], (int, torch.SymInt)):
        return True
    # ATen's kernels depend on strides, and Inductor may choose others: it takes its operands' order of dimensions.
    if not _is_contiguous(tensor_or_none(node)) or not all(map(_is_in_row_order, tensors(node))):
        return False
    if packet in _MOVES or packet in _MAKES:
        return True
    if packet in _CONVERTS:
        return _converts_exactly(node) and _is_rounded(node)
    if not _is_of_one_dtype(node):
        return False
    if packet in _CLAMPS:
        # Either of 0.0 and -0.0 may be taken for the larger.
        return len(node.all_input_nodes) == 1 and 0 not in numbers(node)
    if packet is aten.neg:
        return tensor_of(node).device.type == "cpu"  # Triton subtracts from 0.0
    if packet is aten.amax:
        return cast(Node, node.args[0]).target is aten.abs.default  # for the same reason
    return packet in _CHOOSES or (packet in _ROUNDS and _rounds_once(node) and _is_rounded(node))


def _rounds_once(node: Node) -> bool:
    """Whether ATen computes the op as its definition says, and Inductor as well, with one rounding."""
    result = tensor_of(node)
    packet, on_cpu = functional_op(op_of(node)).overloadpacket, result.device.type == "cpu"
    wide = result.dtype not in _SIXTEEN_BITS
    if packet in (aten.add, aten.sub):
        return bool(node.kwargs.get("alpha", 1) == 1) and len(node.args) == 2
    if packet is aten.div:
        by_number = not isinstance(node.args[1], Node)
        return not node.kwargs and bool(on_cpu or not by_number or (wide and _has_one_reciprocal(node.args[1])))
    if packet is aten.sqrt:
        return not (on_cpu and wide)  # MKL's, which ATen calls, is often off by one place
    if packet is aten.reciprocal:
        return on_cpu or ACCURATE_RECIPROCAL
    if packet is aten.rsqrt:
        # On a CPU 1 / sqrt(x), and in 16 bits both are rounded; on a GPU one and the same instruction, but for float64.
        return wide if on_cpu else result.dtype is not torch.float64
    if packet is aten.pow:
        return bool(wide and node.args[1] == 2)
    return True


def _is_rounded(node: Node) -> bool:
    """Whether what uses the result sees it rounded to its dtype."""
    result = tensor_of(node)
    if ROUNDS_IN_CPP or result.device.type != "cpu" or result.dtype not in _SIXTEEN_BITS:
        return True
    return all(user.op == "output" for user in node.users)


def _has_one_reciprocal(number: Any) -> bool:
    """Whether 1 / number is the same rounded to float32 from float64, as in Inductor, and computed in float32, as in
    ATen; on a GPU both multiply by it."""
    return number != 0 and bool(torch.tensor(1.0 / number) == torch.tensor(float(number)).reciprocal())


def _converts_exactly(node: Node) -> bool:
    [source] = tensors(node)
    result = tensor_of(node)
    if source.device != result.device or not (source.is_floating_point() and result.is_floating_point()):
        return False
    if source.dtype is not torch.float32 and (result.dtype is not torch.float32 or source.dtype in _FP8):
        return False
    if result.dtype in _FP8 and result.device.type != "cpu":  # what is too large saturates in Triton, not in ATen
        return max(map(abs, limits(cast(Node, node.args[0])))) <= float(torch.finfo(result.dtype).max)
    return True


def limits(node: Node) -> tuple[float, float]:
    """Between which numbers a value lies; NaN may be among them."""
    op = op_or_none(node)
    packet = None if op is None else op.overloadpacket
    if packet not in _CLAMPS:
        return -math.inf, math.inf
    low, high = limits(cast(Node, node.args[0]))
    bounds = [*node.args[1:], None]
    given = {aten.clamp_min: (bounds[0], None), aten.clamp_max: (None, bounds[0])}.get(packet, bounds[:2])
    at_least, at_most = (limit if isinstance(limit, (int, float)) else None for limit in given)
    low, high = (bound if at_least is None else max(bound, at_least) for bound in (low, high))
    low, high = (bound if at_most is None else min(bound, at_most) for bound in (low, high))
    return low, high


def _is_of_one_dtype(node: Node) -> bool:
    """Whether an op has operands of one dtype and device, or of dtypes that the result's holds, and no number that has
    to be rounded to that dtype: ATen computes with such numbers in float32."""
    result = tensor_of(node)
    operands = [tensor for tensor in tensors(node) if tensor.dtype is not torch.bool]
    if not operands or any(tensor.device != result.device or tensor.is_complex() for tensor in operands):
        return False
    if len(tensors(node)) < len(node.all_input_nodes):  # there is a size among them, of which the number is not known
        return False
    dtypes = {tensor.dtype for tensor in operands}
    if result.dtype is not torch.bool:
        if not all(torch.promote_types(dtype, result.dtype) == result.dtype for dtype in dtypes):
            return False
        if any(dtype.is_floating_point != result.dtype.is_floating_point for dtype in dtypes):
            return False
    elif len(dtypes) > 1:
        return False
    return all(holds(dtype, number) for dtype in dtypes for number in numbers(node))


def holds(dtype: torch.dtype, number: float) -> bool:
    return dtype not in _SIXTEEN_BITS or torch.tensor(number, dtype=dtype).item() == number


def _is_contiguous(tensor: torch.Tensor | None) -> bool:
    """Whether a tensor is contiguous whatever the symbols in its shape stand for; False for several tensors."""
    if tensor is None:
        return False
    expected: int | torch.SymInt = 1
    for size, stride in reversed(list(zip(tensor.shape, tensor.stride(), strict=True))):
        if isinstance(stride, torch.SymInt) or (size != 1 and stride != expected):
            return False
        expected = size * expected
    return True


def _is_in_row_order(tensor: torch.Tensor) -> bool:
    """Whether strides never grow from one dimension to the next, whatever the symbols in them stand for."""
    strides = [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size != 1 and step != 0]
    return all(at_least(outer, inner) for outer, inner in pairwise(strides))


def tensors(node: Node) -> list[torch.Tensor]:
    return [value for operand in node.all_input_nodes if (value := tensor_or_none(operand)) is not None]


def numbers(node: Node) -> list[float]:
    return [value for value in node.args if isinstance(value, (int, float)) and not isinstance(value, bool)]
