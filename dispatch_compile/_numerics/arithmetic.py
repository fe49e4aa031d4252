"""Where Inductor's arithmetic is not eager's, and what is done about it.

Compiled results may differ from eager ones by rounding, in a few units of the last place, and no more. For each op of
which Inductor's own code does worse there is a rule: another decomposition, which is still fused, or none, so that the
generated code calls ATen's kernel. A graph without such ops is compiled as if there were no rules.

The rules rest on ``python -m benchmarks numerics --ops all``, which compares every op that Inductor has code for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from .._basics.nodes import op_of, op_or_none, tensor_of, tensor_or_none
from .._torch.dispatch import OpOverload, OpOverloadPacket
from .._torch.inductor import compile_node, functional_op, graph_pass
from . import bitwise
from . import decompositions as eager

aten = torch.ops.aten

Decomposition = Callable[..., Any]


@dataclass(frozen=True)
class Rule:
    """What is done about an op.

    Attributes:
        why: what Inductor's own code does.
        decomposition: what to compile instead; None to have ATen compute the op.
        device: where Inductor does so; None for everywhere.
        when: for which of the op's arguments it matters.
        before: the torch version that mended it.
        options: for Inductor, that the decomposition needs.
    """

    why: str
    decomposition: Decomposition | None = None
    device: str | None = None
    when: Callable[[Node], bool] = lambda node: True
    before: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def rule_for(node: Node) -> Rule | None:
    """The rule for one op of a graph, if there is any."""
    device = _device(node)
    for rule in (*RULES_FOR_ALL, *RULES.get(functional_op(op_of(node)).overloadpacket, ())):
        mended = rule.before is not None and torch.__version__ >= rule.before
        if not mended and rule.device in (None, device) and rule.when(node):
            return rule
    return None


def _device(node: Node) -> str | None:
    values = [*bitwise.tensors(node), tensor_or_none(node)]
    devices = [value.device.type for value in values if value is not None]
    return next((device for device in devices if device != CPU), CPU if devices else None)


def _has_minus_zero(node: Node) -> bool:
    numbers = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, float)]
    return any(number == 0 and math.copysign(1, number) < 0 for number in numbers)


def _of_floats(node: Node) -> bool:
    """Whether any operand is a floating-point one."""
    return any(value.is_floating_point() for value in bitwise.tensors(node)) or any(
        isinstance(arg, float) for arg in node.args
    )


def _of_integers(node: Node) -> bool:
    return not any(value.is_floating_point() for value in bitwise.tensors(node))


def _of_bytes_or_bools(node: Node) -> bool:
    return any(value.dtype in (torch.uint8, torch.bool) for value in bitwise.tensors(node))


def _of_bools(node: Node) -> bool:
    return any(value.dtype is torch.bool for value in bitwise.tensors(node))


def _takes_root(node: Node) -> bool:
    return bool(node.args[1] == 0.5) and _in_16_bits(node)


def _by_integer_zero(node: Node) -> bool:
    return _of_floats(node) and any(isinstance(arg, int) and arg == 0 for arg in node.args)


def _at_zero(node: Node) -> bool:
    """Whether a limit is zero: it may be taken for the zero of another sign."""
    return _of_floats(node) and any(bound == 0 for bound in node.args[1:] if isinstance(bound, (int, float)))


def _scaled(node: Node) -> bool:
    """Whether an operand is multiplied first, and it matters. It does not for integers, whose sums are exact. It does
    for bools, whose sums are 0 or 1."""
    alpha = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
    return bool(alpha != 1) and (_of_floats(node) or tensor_of(node).dtype is torch.bool)


def _shifts_beyond(node: Node) -> bool:
    """Whether bits may be shifted by less than none or more than all; up to 32 bits the hardware minds the latter."""
    dtype, by = tensor_of(node).dtype, node.args[1]
    if isinstance(by, int):
        return not 0 <= by < (1 if dtype is torch.bool else torch.iinfo(dtype).bits)
    return dtype is torch.int64


def _number_is_rounded(node: Node) -> bool:
    """Whether a number is not one of the 16-bit dtype beside it."""
    dtypes = {value.dtype for value in bitwise.tensors(node)}
    return any(not bitwise.holds(dtype, number) for dtype in dtypes for number in bitwise.numbers(node))


def _number_is_rounded_first(node: Node) -> bool:
    return _number_first(node) and _number_is_rounded(node)


def _by_scalar_overload(node: Node) -> bool:
    """Whether it is an overload for numbers; one in the place of a tensor, as in x + 0.1, is rounded on a CPU only."""
    return functional_op(op_of(node))._overloadname == "Scalar" and _number_is_rounded(node)


def _number_second_is_rounded(node: Node) -> bool:
    return not isinstance(node.args[1], Node) and _number_is_rounded(node)


def _is_filled_with_rounded(node: Node) -> bool:
    return not bitwise.holds(tensor_of(node).dtype, cast(float, node.args[1]))


def _to_byte(node: Node) -> bool:
    dtype = node.kwargs.get("dtype")
    return _of_floats(node) and (dtype is torch.int8 or (dtype is torch.uint8 and _in_64_bits(node)))


def _to_small_integer(node: Node) -> bool:
    return node.kwargs.get("dtype") in eager.CONVERTED_THROUGH and _of_floats(node)


def _between_float8_and_others(node: Node) -> bool:
    """Whether a conversion is from float8 or to it, and not to float32 or 16 bits or from them."""
    between = {bitwise.tensors(node)[0].dtype, node.kwargs.get("dtype") or torch.float32}
    return not between.isdisjoint(eager.FLOAT8) and not between & {torch.float32, *eager.SIXTEEN_BITS}


def _to_float8_without_limits(node: Node) -> bool:
    """Whether numbers may be out of range; quantization limits them first."""
    if node.kwargs.get("dtype") is not torch.float8_e4m3fn or not isinstance(node.args[0], Node):
        return False
    return max(map(abs, bitwise.limits(node.args[0]))) > eager.LARGEST_ROUNDED_TO_E4M3


def _is_contiguous(node: Node) -> bool:
    return bool(bitwise.tensors(node)[0].is_contiguous())


def _of_statistics(node: Node) -> bool:
    """Whether more is used than the first of the results."""
    return any(user.args[1] != 0 for user in node.users)


def _inverts(node: Node) -> bool:
    return node.args[1] in (-0.5, -2)


def _floors(node: Node) -> bool:
    return bool(node.kwargs.get("rounding_mode") == "floor") and _of_floats(node)


def _rounds_quotient(node: Node) -> bool:
    return node.kwargs.get("rounding_mode") is not None and _of_floats(node)


def _with_tensor(node: Node) -> bool:
    return _of_floats(node) and len(bitwise.tensors(node)) > 1


def _may_be_at_zero(node: Node) -> bool:
    """Whether a limit is zero, or a tensor."""
    return _at_zero(node) or _with_tensor(node)


def _in_32_bits(node: Node) -> bool:
    return bool(bitwise.tensors(node)[0].dtype is torch.float32)


def _gives_32_bits(node: Node) -> bool:
    return tensor_of(node).dtype is torch.float32


def _gives_bools(node: Node) -> bool:
    return tensor_of(node).dtype is torch.bool


def _in_small_integers(node: Node) -> bool:
    return _of_integers(node) and bitwise.tensors(node)[0].dtype.itemsize < 4


def _in_64_bits(node: Node) -> bool:
    return bool(bitwise.tensors(node)[0].dtype is torch.float64)


def _in_16_bits(node: Node) -> bool:
    return any(value.dtype in eager.SIXTEEN_BITS for value in bitwise.tensors(node))


def _beside_0_dims(node: Node) -> bool:
    """Whether a tensor without dimensions is taken for a number."""
    return _of_floats(node) and {value.dim() == 0 for value in bitwise.tensors(node)} == {True, False}


def _number_first(node: Node) -> bool:
    return not isinstance(node.args[0], Node) and _of_floats(node)


def _number_first_of_integers(node: Node) -> bool:
    return not isinstance(node.args[0], Node) and not _of_floats(node)


_QUOTIENT = "floors the rounded quotient, which can be off by one"
_STEPS = "does not round to 16 bits after each step, as eager does"
_NEAR_ZERO = "vector code loses small arguments beside 1"
_DIGITS = "code with fewer digits"
_FUSED = "does not fuse the multiplication and the addition, as eager does: that shows where they cancel"
_NUMBER = "does not round the number to 16 bits, as eager does"
_NUMBER_IN_32_BITS = "may round the number to 16 bits, as eager does not"
_MEAN = "gives the mean of what has an infinity in it, which is NaN in eager"
_SQUARES = "squares large arguments, beyond infinity"
_SATURATES = "saturates what 8 bits do not hold"
_ZEROS = "takes either zero for the larger"

_TWO_ZEROS = "takes either zero for the smaller"
_NAN = "finds another place for NaN"
_PLACE = "finds the first place"

CPU, CUDA = "cpu", "cuda"
_EXACT_QUOTIENT = {"eager_numerics.division_rounding": True}

RULES_FOR_ALL = (Rule("writes 0.0 for the number -0.0", device=CUDA, when=_has_minus_zero),)
# The first rule that applies counts.
RULES: dict[OpOverloadPacket, tuple[Rule, ...]] = {
    aten.floor_divide: (
        Rule(_STEPS, when=_in_16_bits),
        Rule(_QUOTIENT, eager.floor_divide, when=_of_floats, options=_EXACT_QUOTIENT),
    ),
    aten.div: (
        Rule(_STEPS, when=lambda node: bool(node.kwargs) and _in_16_bits(node)),
        Rule(_QUOTIENT, eager.divide, CPU, when=_floors),
        Rule(_QUOTIENT, eager.divide, CUDA, when=_rounds_quotient, options=_EXACT_QUOTIENT),
        Rule(_NUMBER_IN_32_BITS, eager.div_in_32_bits, when=_number_second_is_rounded),
    ),
    aten.remainder: (
        Rule("calls another fmod", device=CPU, when=_number_first),
        Rule("divides the number by zero in another way", device=CUDA, when=_number_first_of_integers),
        Rule(_NUMBER, when=_beside_0_dims),
        Rule(_QUOTIENT, eager.remainder, when=_of_floats),
    ),
    aten.mul: (
        Rule("takes the product with the integer 0 for zeros", eager.mul, when=_by_integer_zero),
        Rule(_NUMBER_IN_32_BITS, eager.mul, when=_number_second_is_rounded),
    ),
    aten.full: (Rule(_NUMBER, eager.full, when=_is_filled_with_rounded),),
    aten.full_like: (Rule(_NUMBER, eager.full_like, when=_is_filled_with_rounded),),
    aten.fmod: (
        Rule(_NUMBER, when=_beside_0_dims),
        Rule(_NUMBER, eager.rounding_its_number(aten.fmod.Scalar), when=_number_is_rounded),
    ),
    aten.clamp: (
        Rule(_ZEROS, eager.clamp, CPU, _at_zero),
        Rule(_TWO_ZEROS, eager.clamp_on_gpu, CUDA, _may_be_at_zero),
    ),
    aten.clamp_min: (
        Rule(_ZEROS, eager.clamp, CPU, _at_zero),
        Rule(_TWO_ZEROS, eager.clamp_on_gpu, CUDA, _with_tensor),
    ),
    aten.clamp_max: (
        Rule(_ZEROS, eager.clamp_max, CPU, _at_zero),
        Rule(_TWO_ZEROS, eager.clamp_max_on_gpu, CUDA, _may_be_at_zero),
    ),
    aten.maximum: (Rule(_TWO_ZEROS, eager.maximum, CUDA, _of_floats),),
    aten.minimum: (Rule(_TWO_ZEROS, eager.minimum, CUDA, _of_floats),),
    aten.max: (
        Rule(_TWO_ZEROS, eager.maximum, CUDA, _with_tensor),
        Rule(_PLACE, device=CUDA, when=_of_bools),
    ),
    aten.min: (
        Rule(_TWO_ZEROS, eager.minimum, CUDA, _with_tensor),
        Rule(_PLACE, device=CPU, when=_of_bytes_or_bools),
        Rule(_PLACE, device=CUDA, when=_of_bools),
    ),
    aten.argmin: (Rule(_PLACE, device=CPU, when=_of_bytes_or_bools),),
    aten.relu: (Rule(_TWO_ZEROS, eager.relu, CUDA, _of_floats),),
    aten.hardtanh: (
        Rule("gives floating-point numbers for integers", when=_of_integers),
        Rule(_ZEROS, eager.hardtanh, CPU, _at_zero),
        Rule(_TWO_ZEROS, eager.hardtanh_on_gpu, CUDA, _at_zero),
    ),
    aten.threshold: (
        Rule("computes with integers as floating-point numbers", when=_of_integers),
        Rule(_NUMBER, device=CUDA, when=_number_is_rounded),
    ),
    aten.hardshrink: (Rule(_NUMBER, device=CUDA, when=_number_is_rounded),),
    **{
        packet: (Rule(_NUMBER, eager.rounding_its_number(packet.Scalar), CUDA, _by_scalar_overload),)
        for packet in (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)
    },
    **dict.fromkeys([aten.cosh, aten.sinh], (Rule("overflows later for integers", device=CPU, when=_of_integers),)),
    **dict.fromkeys([aten.fmax, aten.fmin], (Rule(_ZEROS),)),
    aten._to_copy: (
        Rule(_SATURATES, eager.to_copy, CPU, _to_byte),
        Rule("cannot convert these", device=CUDA, when=_between_float8_and_others),
        Rule(_SATURATES, eager.to_copy, CUDA, _to_small_integer),
        Rule(_SATURATES, eager.to_copy, CUDA, _to_float8_without_limits),
    ),
    aten.sigmoid: (Rule(_DIGITS, eager.sigmoid, CUDA, _gives_32_bits),),
    **dict.fromkeys(
        [aten.__lshift__, aten.__rshift__, aten.bitwise_left_shift, aten.bitwise_right_shift],
        (Rule("leaves shifts beyond the bits to the hardware", device=CUDA, when=_shifts_beyond),),
    ),
    **dict.fromkeys(
        [aten.index_add, aten.index_put, aten.scatter_add, aten.scatter_reduce, aten.col2im],
        (
            Rule("has no atomic addition of so few bits", device=CUDA, when=_in_small_integers),
            Rule("has no atomic addition of bools", device=CPU, when=_gives_bools),
        ),
    ),
    aten.glu: (Rule(_DIGITS, eager.glu, CUDA, _in_32_bits),),
    aten.signbit: (Rule("does not see the sign of -0.0", device=CUDA, when=_in_64_bits),),
    aten.frexp: (Rule("other exponents for what is subnormal or not finite", device=CUDA),),
    **dict.fromkeys(
        [aten.i0, aten.special_modified_bessel_i0],
        (Rule(_DIGITS, device=CUDA), Rule(_DIGITS, when=_in_64_bits)),
    ),
    aten.special_erfcx: (Rule(_DIGITS, device=CUDA),),
    **dict.fromkeys([aten.hardsigmoid, aten.hardswish], (Rule(_DIGITS, device=CUDA, when=_in_64_bits),)),
    **dict.fromkeys(
        [aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d, aten._upsample_nearest_exact3d],
        (Rule("computes places with fewer digits", when=_in_64_bits),),
    ),
    **dict.fromkeys([aten.bucketize, aten.searchsorted], (Rule(_NAN, device=CUDA, when=_of_floats),)),
    aten.sort: (Rule(_NAN, device=CUDA, when=_of_floats),),
    aten.neg: (Rule("subtracts from zero", eager.neg, CUDA, _of_floats),),
    **dict.fromkeys([aten.expm1, aten.erf, aten.atanh, aten.elu, aten.celu], (Rule(_NEAR_ZERO, device=CPU),)),
    aten.acosh: (Rule(_SQUARES, device=CPU),),
    aten.asinh: (Rule(_SQUARES, device=CPU, before="2.13"),),
    aten.frac: (Rule("gives the wrong zero", before="2.13"),),
    aten.gelu: (Rule("eager calls oneDNN, which gives NaN for infinity", device=CPU, when=_is_contiguous),),
    aten.pow: (
        Rule("takes the square root, of -inf, too", device=CPU, when=_takes_root),
        Rule("raises the reciprocal to the power, or the other way round", when=_inverts),
        Rule(_NUMBER, when=_number_is_rounded_first),
        Rule(_NUMBER, eager.rounding_its_number(aten.pow.Tensor_Scalar), CPU, _number_second_is_rounded),
    ),
    aten.softshrink: (Rule("gives 0 for NaN"),),
    aten.round: (Rule("multiplies by a power of ten, where eager divides", when=lambda n: "decimals" in n.kwargs),),
    aten.logit: (
        Rule(_STEPS, device=CPU, when=_in_16_bits),
        Rule(_DIGITS, device=CUDA, when=_in_32_bits),
    ),
    aten.addcdiv: (Rule(_FUSED, device=CUDA),),
    aten.nextafter: (Rule("gives a number of 32 bits", when=_in_16_bits),),
    **dict.fromkeys([aten.var_mean, aten.std_mean], (Rule(_MEAN),)),
    aten.native_layer_norm: (Rule(_MEAN, when=_of_statistics),),
    aten._euclidean_dist: (Rule("multiplies matrices in another order, which shows where the product cancels"),),
    aten.add: (
        Rule(_FUSED, when=_scaled),
        Rule(_NUMBER, eager.rounding_its_number(aten.add.Scalar), CPU, _by_scalar_overload),
        Rule(_NUMBER, eager.rounding_its_number(aten.add.Tensor), CPU, _number_second_is_rounded),
    ),
    **{
        packet: (
            Rule(_FUSED, when=_scaled),
            Rule(_NUMBER, eager.rounding_its_number(packet.Scalar), CPU, _by_scalar_overload),
            Rule(_NUMBER, eager.rounding_its_number(packet.Tensor), CPU, _number_second_is_rounded),
        )
        for packet in (aten.sub, aten.rsub)
    },
    aten.ldexp: (
        Rule("multiplies by a power of two that may be infinite", when=_in_16_bits),
        Rule("multiplies by an inexact power of two", device=CUDA, when=_of_integers),
    ),
    aten.log_sigmoid_forward: (Rule(_ZEROS, device=CPU, when=_in_16_bits),),
    **dict.fromkeys(
        [
            aten.addcmul,
            aten.lerp,
            aten.linalg_cross,
            aten.affine_grid_generator,
            aten.grid_sampler_2d,
            aten.upsample_linear1d,
            aten.upsample_bilinear2d,
            aten.upsample_trilinear3d,
            aten.upsample_bicubic2d,
        ],
        (Rule(_FUSED),),
    ),
    **dict.fromkeys(
        [
            aten.logaddexp2,
            aten.erfinv,
            aten.igamma,
            aten.igammac,
            aten.mvlgamma,
            aten.special_airy_ai,
            aten.special_bessel_j0,
            aten.special_bessel_j1,
            aten.special_bessel_y0,
            aten.special_bessel_y1,
            aten.special_i0e,
            aten.special_i1,
            aten.special_i1e,
            aten.special_modified_bessel_i1,
            aten.special_modified_bessel_k0,
            aten.special_modified_bessel_k1,
            aten.special_scaled_modified_bessel_k0,
            aten.special_scaled_modified_bessel_k1,
            aten.special_log_ndtr,
            aten.special_ndtr,
            aten.special_xlog1py,
        ],
        (Rule(_DIGITS),),
    ),
}


@dataclass(frozen=True)
class Treatment:
    """What a graph's ops become, apart from what Inductor would make of them.

    Attributes:
        decompositions: in place of Inductor's; None to leave an op whole, so that ATen computes it.
        options: for Inductor.
    """

    decompositions: Mapping[OpOverload, Decomposition | None] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def treatment(graph: GraphModule, equal_bits: bool) -> Treatment:
    """How to compile a graph for results that differ from eager ones by rounding at most; or not at all."""
    nodes = [node for node in graph.graph.nodes if op_or_none(node) is not None]
    if equal_bits:
        whole = frozenset(functional_op(op_of(node)) for node in nodes if not bitwise.is_exact(node))
        return Treatment(dict.fromkeys(whole), {**bitwise.OPTIONS, **_compiling(whole, bitwise.is_exact)})
    found = [(functional_op(op_of(node)), rule) for node in nodes if (rule := rule_for(node)) is not None]
    # Where one call of an op is left to ATen, all are.
    whole = frozenset(op for op, rule in found if rule.decomposition is None)
    rules = {op: None if op in whole else rule.decomposition for op, rule in found}
    options = {name: value for _, rule in found for name, value in rule.options.items()}
    if whole:
        options |= {"fallback_by_default": True, **_compiling(whole, lambda node: True)}
    return Treatment(rules, options)


def _compiling(whole: frozenset[OpOverload], compiles: Callable[[Node], bool]) -> Mapping[str, Any]:
    """The option that has Inductor compile what is not left whole and is to be compiled."""

    def mark(graph: Graph) -> None:
        for node in graph.nodes:
            op = op_or_none(node)
            if op is not None and op not in whole and compiles(node):
                compile_node(node)

    return {"post_grad_custom_post_pass": graph_pass(mark, (__file__, bitwise.__file__), sorted(map(str, whole)))}
