"""Compiled arithmetic is eager's, but for rounding, in the default configuration; what needs no rule does not pay."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody gives it
from hypothesis import HealthCheck, given, settings
from support import specializations
from torch import Tensor

import dispatch_compile as dc
from benchmarks import sweep, sweep_values
from benchmarks.cases import CASES, Inputs, Sizes
from benchmarks.sweep_results import DEFAULT, faults_of
from benchmarks.ulps import Distance
from dispatch_compile._numerics import arithmetic as _arithmetic
from dispatch_compile._numerics import decompositions as eager
from dispatch_compile._numerics.arithmetic import RULES, Treatment, treatment
from dispatch_compile._numerics.bitwise import ROUNDS_IN_CPP

pytestmark = [pytest.mark.long, pytest.mark.run_once]

BF16, FP16, FP32 = DTYPES = torch.bfloat16, torch.float16, torch.float32


def compiled(op: dc.IrOp, *args: Any, bitwise: bool = False) -> tuple[Any, str]:
    """The result of compiled code, and the code."""
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(bitwise=bitwise))
    with mode:
        result = op(*args)
    assert mode.cache.stats().hits == 1
    return result, str(specializations(mode, op)[0].code.source)


def aten_calls(code: str) -> list[str]:
    return re.findall(r"= torch\.ops\.aten\.(\w+)", code)


# ---- The right values. Rows of 24 and more: vector code runs, and the code for what is left over.


def floor_divide(x: Tensor, y: Tensor) -> Tensor:
    return x // y


def floor_divide_by_number(x: Tensor, y: Tensor) -> Tensor:
    return x // 0.1


def floor_mode(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")


def remainder(x: Tensor, y: Tensor) -> Tensor:
    return x % y


def remainder_by_number(x: Tensor, y: Tensor) -> Tensor:
    return x % -1.7


def remainder_of_number(x: Tensor, y: Tensor) -> Tensor:
    return 1.7 % y


def fmod_by_number(x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, 1.7)


def truncated(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode="trunc")


def number_minus(x: Tensor, y: Tensor) -> Tensor:
    return 1.7 - x


def numbers_beside(x: Tensor, y: Tensor) -> Tensor:
    return torch.where((x * 1.1 > 0.3) & (x - 0.1 < y), 0.1 + x / 3, torch.where(y > 0, 1.7, x))


NUMBERS_BESIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "x + 0.1": lambda x: x + 0.1,
    "x - 0.1": lambda x: (x - 0.1) - x,
    "0.1 - x": lambda x: 0.1 - x,
    "x * 0.7": lambda x: x * 0.7071067811865476 + 1,
    "x / 3.3": lambda x: x / 3.3 + 1,
    "1.7 / x": lambda x: 1.7 / x,
    "x ** 1.7": lambda x: x**1.7 - 1,
    "full": lambda x: x * torch.full_like(x, 0.1) + x * x.new_full((), 0.1) + torch.full(x.shape, 1.1, dtype=x.dtype),
    "choice": lambda x: torch.where(x > 0.1, 0.1, x) * 3 + x.masked_fill(x > 0, 0.1),
    "equal": lambda x: (x == 0.1) | (x >= 1.7),
}


@pytest.mark.skipif(not ROUNDS_IN_CPP, reason="torch 2.11 and 2.12 do not round between two ops")
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_numbers_are_rounded_where_eager_rounds_them(dtype, rounds, define_ir_op):
    """For all numbers of 16 bits, whether or not Inductor rounds what comes in between."""

    def numbers(x: Tensor) -> list[Tensor]:
        return [f(x) for f in NUMBERS_BESIDE.values()] if rounds else [x + 0.1, x - 0.1, x * 0.1, x / 3.3, x**1.7]

    op = define_ir_op(numbers)
    options = {"emulate_precision_casts": rounds}
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(options=options, on_failure="raise"))
    x = sweep_values.ones(dtype)
    with mode:
        actual = op(x)
    assert mode.cache.stats().hits == 1
    apart = [int(Distance.apart(one, other).max()) for one, other in zip(actual, op(x), strict=True)]
    assert max(apart) <= (0 if rounds else 1), apart


def zero_limits(x: Tensor, y: Tensor) -> Tensor:
    return 1 / (x * 0).clamp(min=0.0) + 1 / torch.clamp(y * 0, 0.0, 6.0) + 1 / F.relu6(x * 0)


def powers(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x**-2, x**-0.5, 0.1**x])


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "expm1": torch.expm1,
    "nothing of it": lambda x: x * 0,
    "erf": torch.erf,
    "atanh": torch.atanh,
    "acosh": torch.acosh,
    "tanh": torch.tanh,
    "elu": lambda x: F.elu(x, 0.52),
    "elu's zero": lambda x: F.elu(x * 0, 0.52) / torch.zeros_like(x),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.3),
    "gelu": F.gelu,
    "ndtr": lambda x: torch.special.ndtr(x.float()),
    "log_ndtr": lambda x: torch.special.log_ndtr(x.float()),
    "erfinv": torch.erfinv,
    "softshrink": F.softshrink,
    "round": lambda x: torch.round(x, decimals=-1),
    "logit": lambda x: torch.logit(x, 1e-3),
    "xlog1py": lambda x: torch.special.xlog1py(x, x),
    "logaddexp2": lambda x: torch.logaddexp2(x, -x),
    "lerp": lambda x: torch.lerp(x, 1 - x, 0.3),
    "alpha": lambda x: torch.add(x, -x * 10, alpha=0.1),
    "addcmul": lambda x: torch.addcmul(-x, x, x, value=0.1),
    "to int8": lambda x: x.to(torch.int8),
}
QUOTIENTS = [
    floor_divide,
    floor_divide_by_number,
    floor_mode,
    truncated,
    remainder,
    remainder_by_number,
    remainder_of_number,
    fmod_by_number,
    number_minus,
    numbers_beside,
    zero_limits,
    powers,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_differ_by_rounding_at_most(dtype, define_ir_op):
    """All of them in one graph, for pairs of all special values, and for every number of 16 bits."""

    def natives(x: Tensor, x_other: Tensor, x_one: Tensor) -> list[Tensor]:
        return [*(f(x, x_other) for f in QUOTIENTS), *(f(x_one) for f in FUNCTIONS.values())]

    op, mode = define_ir_op(natives), dc.DispatchCompileMode()
    first, second = sweep_values.several(dtype, 2)
    args = first, second, sweep_values.ones(dtype)
    expected = op(*args)
    with mode:
        actual = op(*args)
    assert mode.cache.stats().hits == 1
    names = [f.__name__ for f in QUOTIENTS] + list(FUNCTIONS)
    found = {name: dict(faults_of(one, other)) for name, one, other in zip(names, actual, expected, strict=True)}
    if not ROUNDS_IN_CPP:  # what is compared and chosen there is rounded in between
        del found["numbers_beside"]
    assert not {name: faults for name, faults in found.items() if faults}


@pytest.mark.parametrize("bitwise", [False, True])
def test_ops_that_write_to_their_arguments(bitwise, define_ir_op):
    def natives(x: Tensor, y: Tensor) -> list[Tensor]:
        return [
            F.elu(x * 1, inplace=True),
            (x * 1).expm1_(),
            torch.erf(x, out=torch.empty_like(x)),
            (x * 1).floor_divide_(y),
            (x * 1).div_(0.1, rounding_mode="floor"),
            (x * 1).remainder_(1.7),
            torch.fmod(x, y, out=torch.empty_like(x)),
            (x * 1).mul_(0),
            (x * 1).clamp_(min=0.0),
            F.silu(x * 1, inplace=True),
        ]

    op, mode = define_ir_op(natives), dc.DispatchCompileMode(config=dc.CompileConfig(bitwise=bitwise))
    x, y = (values[:1000] for values in sweep_values.several(FP32, 2))
    expected = op(x, y)
    with mode:
        actual = op(x, y)
    assert mode.cache.stats().hits == 1
    found = [dict(faults_of(one, other)) for one, other in zip(actual, expected, strict=True)]
    assert not any(found), found
    if bitwise:
        assert not any(Distance.between([one], [other]).different for one, other in zip(actual, expected, strict=True))


def test_known_values(define_ir_op):
    op = define_ir_op(floor_divide)
    x, y = torch.tensor([0.3, 0.6, 0.5, 1.0, 0.7, -1e-30] * 8), torch.full((48,), 0.1)
    result, code = compiled(op, x, y)
    assert result[:6].tolist() == op(x, y)[:6].tolist() == [3.0, 6.0, 4.0, 9.0, 6.0, -1.0]
    assert not aten_calls(code)  # it stays fused
    op = define_ir_op(remainder)
    x, y = torch.tensor([-1e-8, 1e-8, 5.0, -5.0] * 8), torch.tensor([3.0, -3.0, math.inf, math.inf] * 8)
    assert compiled(op, x, y)[0][:4].tolist() == [3.0, -3.0, 5.0, math.inf]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bool, torch.int64], ids=str)
def test_places_of_extremes(dtype, define_ir_op):
    def places(x: Tensor) -> list[Tensor]:
        arguments = [] if x.dtype is torch.bool else [x.argmin(0), x.argmax(0)]
        return [*x.min(-1), *x.min(0), *x.max(-1), *x.max(0), *arguments]

    op, x = define_ir_op(places), sweep_values.rows(dtype, special=True)
    assert all(torch.equal(one, other) for one, other in zip(compiled(op, x)[0], op(x), strict=True))


def test_integers(define_ir_op):
    def quotients(x: Tensor, y: Tensor) -> list[Tensor]:
        return [x // y, x % y, torch.fmod(x, y), torch.div(x, y, rounding_mode="floor"), x // 3, x % -3, x / y]

    x = torch.tensor([7, -7, 7, -7, 2**31 - 1, -(2**31) + 1, 0, 5] * 8, dtype=torch.int32)
    y = torch.tensor([2, 2, -2, -2, -3, 3, 5, -7] * 8, dtype=torch.int32)
    op, mode = define_ir_op(quotients), dc.DispatchCompileMode()
    with mode:
        actual = op(x, y)
    assert mode.cache.stats().hits == 1
    assert all(torch.equal(one, other) for one, other in zip(actual, op(x, y), strict=True))


def test_zeros_that_are_added(define_ir_op):
    """-0.0 plus 0.0 is 0.0: the addition is not to be left out."""

    def added(x: Tensor) -> list[Tensor]:
        made = torch.zeros_like(x)
        sums = [
            x + made,
            made + x,
            x + torch.zeros(1),
            x * 1 + torch.full((24,), 0.0),
            x - -made,
            x + torch.tensor(0.0),
        ]
        return [*sums, x + made * 2, (x * 1).add_(x.new_zeros(())), x + 0.0, x + 0, x - made]

    op = define_ir_op(added)
    x = torch.tensor([0.0, -0.0, 1.0] * 8)
    assert [result.signbit().any().item() for result in compiled(op, x)[0]] == [False] * 10 + [True]
    assert [result.signbit().any().item() for result in op(x)] == [False] * 10 + [True]


# ---- Only bodies with such ops pay


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ops_that_ship_are_compiled_as_without_rules(name, dtype, device, monkeypatch):
    """By the rules for a GPU, too; no GPU is needed to ask."""
    monkeypatch.setattr(_arithmetic, "_device", lambda node: device)
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(on_failure="raise"))
    seen: list[Treatment] = []
    treated = _arithmetic.treatment
    monkeypatch.setattr(
        "dispatch_compile._compile.compilation.treatment", lambda *a: seen.append(treated(*a)) or seen[-1]
    )
    monkeypatch.setattr("dispatch_compile._compile.compilation.inductor_compile", stopping)
    arguments = CASES[name].arguments(Inputs(Sizes(7, 1024, dtype, "cpu")))
    with mode, pytest.raises(dc.CompileError, match="seen enough"):
        CASES[name].op(*arguments)
    assert seen
    assert set(map(str, seen)) == {str(Treatment())}


def stopping(*args: Any) -> None:
    raise RuntimeError("seen enough")


def test_without_an_op_that_has_a_rule_the_code_is_the_same(define_ir_op, monkeypatch):
    x, weight = torch.randn(7, 64), torch.rand(64)

    def code() -> str:
        op = define_ir_op(body, name="body_without_rules")
        try:
            return re.sub(r"\w*body\w*|c[a-z0-9]{50,}", "", compiled(op, x, weight)[1])
        finally:
            op.unregister()

    def body(x: Tensor, weight: Tensor) -> Tensor:
        return F.silu(x) * weight.clamp(-448.0, 448.0) / (x.sum(-1, keepdim=True) + 1.1)

    with_rules = code()
    monkeypatch.setattr(_arithmetic, "RULES", {})
    assert code() == with_rules


def test_aten_computes_the_op_and_inductor_fuses_the_rest(define_ir_op):
    def body(x: Tensor) -> Tensor:
        return (x * 2 + 1).sigmoid() * torch.expm1(x) + x.abs() * 3

    result, code = compiled(define_ir_op(body), torch.full((4, 24), 1e-8))
    assert result.unique().item() == pytest.approx(3.73105857e-8)
    assert aten_calls(code) == ["expm1"]
    assert code.count("async_compile.cpp_pybinding(") == 1


def test_a_rule_holds_where_it_says(define_ir_op):
    """For limits of zero; other limits are what they were."""

    def limited(x: Tensor) -> Tensor:
        return x.clamp(-448.0, 448.0)

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4)
    for low, ruled in ((0.0, True), (-448.0, False)):
        node = graph.call_function(torch.ops.aten.clamp.default, (x, low, 448.0))
        node.meta["val"] = torch.empty(4)
        assert (_arithmetic.rule_for(node) is not None) is ruled
    assert not aten_calls(compiled(define_ir_op(limited), torch.randn(4, 24))[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_calls_of_one_op_that_differ_for_different_reasons(dtype, define_ir_op):
    """A rule's decomposition is for all calls of its op in a graph."""

    def body(x: Tensor) -> list[Tensor]:
        e4m3 = (x * 100).to(torch.float8_e4m3fn)
        return [x * 0, x * 0.1, x * 0, e4m3.float(), (x * 100).to(torch.int8), x.clamp(0.0, 1.0), x.clamp(-0.3, 0.7)]

    op, x = define_ir_op(body), sweep_values.ones(dtype)
    for one, other in zip(compiled(op, x)[0], op(x), strict=True):
        assert not dict(faults_of(one, other))


def test_one_call_left_to_aten_leaves_all_of_its_op(define_ir_op):
    """Whichever comes first: in 16 bits // is ATen's, in 32 bits it is fused."""

    def body(x: Tensor, y: Tensor) -> list[Tensor]:
        return [x // 0.1, y // 0.1, (x + 1) // 0.1]

    x, y = sweep_values.several(BF16, 2)
    _, code = compiled(define_ir_op(body), x, y.float())
    assert set(aten_calls(code)) == {"floor_divide"}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_zeros_on_a_gpu(dtype):
    """-0.0 is the smaller one; NaN is either's result."""
    numbers = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-40], dtype=dtype)
    x, y = (grid.flatten() for grid in torch.meshgrid(numbers, numbers, indexing="ij"))
    zeros, negative = (x == 0) & (y == 0), torch.stack([x, y]).signbit()
    of_zeros = [torch.where(sign, -0.0, 0.0).to(dtype) for sign in (negative.all(0), negative.any(0))]
    for decomposition, op, zero in zip(
        (eager.maximum, eager.minimum), (torch.maximum, torch.minimum), of_zeros, strict=True
    ):
        assert not dict(faults_of(decomposition(x, y), torch.where(zeros, zero, op(x, y))))
    assert not dict(faults_of(eager.relu(x), torch.where(x == 0, 0.0, x.relu())))
    assert not dict(faults_of(eager.clamp_on_gpu(x, None, 0), torch.where(x == 0, x, x.clamp(max=0.0))))


def test_minus_zero_is_left_to_aten_on_a_gpu(define_ir_op, monkeypatch):
    """Triton writes 0.0 for it."""
    monkeypatch.setattr(_arithmetic, "_device", lambda node: "cuda")

    def body(x: Tensor) -> list[Tensor]:
        return [torch.where(x > 0, x, -0.0), torch.full_like(x, -0.0), x + 1]

    result, code = compiled(define_ir_op(body), torch.tensor([1.0, -1.0] * 12))
    assert aten_calls(code)
    assert result[0].signbit().tolist() == [False, True] * 12
    assert result[1].signbit().all()


def test_every_rule_is_one_for_an_op_that_inductor_has_code_for():
    known = {op.overloadpacket for op in _arithmetic_ops()}
    assert set(RULES) <= known
    assert treatment(torch.fx.GraphModule({}, torch.fx.Graph()), False) == Treatment()


def _arithmetic_ops() -> list[Any]:
    from dispatch_compile._torch.inductor import inductors_ops

    return inductors_ops()


# ---- Interpolation, which torch decomposes before anybody sees it


INTERPOLATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "bilinear": lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, size=(13, 17), mode="bicubic", align_corners=True),
    "nearest": lambda x: F.interpolate(x, scale_factor=1.7, mode="nearest"),
    "nearest-exact": lambda x: F.interpolate(x, size=(13, 17), mode="nearest-exact"),
    "antialias": lambda x: F.interpolate(x, size=(5, 3), mode="bilinear", antialias=True),
    "linear": lambda x: F.interpolate(x[:, 0], size=13, mode="linear"),
    "trilinear": lambda x: F.interpolate(x[:, None], scale_factor=1.7, mode="trilinear"),
    "area": lambda x: F.interpolate(x, size=(5, 3), mode="area"),
    "grid": lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1).sin(), align_corners=False),
}


@pytest.mark.parametrize("inference", [True, False])
def test_interpolation_has_the_bits_of_eager(inference, define_ir_op):
    def interpolated(x: Tensor) -> list[Tensor]:
        return [f(x).contiguous() for f in INTERPOLATIONS.values()]

    op, mode = define_ir_op(interpolated), dc.DispatchCompileMode(config=dc.CompileConfig(bitwise=True))
    with torch.inference_mode(inference):
        x = torch.randn(3, 4, 8, 9, generator=torch.Generator().manual_seed(0))
        expected = op(x)
        with mode:
            actual = op(x)
    assert mode.cache.stats().hits == 1
    equal = {n: torch.equal(a, e) for n, a, e in zip(INTERPOLATIONS, actual, expected, strict=True)}
    assert all(equal.values()), equal


# ---- Values drawn at random


NUMBERS = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1e-38, -1e-30, 1e-8, 0.1, 0.3, 0.5, 2.5, -3.0, 88.7, 3e38])


def has_a_remainder(pair: tuple[float, float]) -> bool:
    """Whether the quotient is a float32. Of others, eager's vector code gives NaN, and the rest of a row a number."""
    x, y = pair
    return y == 0 or not math.isfinite(x) or abs(x) <= abs(y) * torch.finfo(torch.float32).max


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers=st.lists(st.tuples(NUMBERS, NUMBERS).filter(has_a_remainder), min_size=1, max_size=70))
def test_drawn_values(numbers, drawn):
    op, mode = drawn
    x, y = (torch.tensor(column, dtype=torch.float32) for column in zip(*numbers, strict=True))
    count = torch.arange(70) % len(x)
    args = x[count], y[count]
    expected = op(*args)
    with mode:
        actual = op(*args)
    for one, other in zip(actual, expected, strict=True):
        assert not dict(faults_of(one, other))


@pytest.fixture(scope="module")
def drawn():
    def natives(x: Tensor, y: Tensor) -> list[Tensor]:
        binary = [floor_divide, floor_divide_by_number, remainder, fmod_by_number, number_minus]
        unary = [FUNCTIONS[name] for name in ("expm1", "erf", "elu", "selu", "atanh", "acosh", "round")]
        return [*(f(x, y) for f in binary), *(f(x) for f in unary)]

    op, mode = dc.register_op(natives, name="drawn_arithmetic"), dc.DispatchCompileMode()
    yield op, mode
    op.unregister()
    assert mode.cache.stats().compiles == 1
    assert mode.cache.stats().hits > 0


# ---- A sample of the sweep


def test_sample_of_all_ops():
    threads = torch.get_num_threads()
    try:
        found = sweep.run("cpu", None, ["fp32", "bf16", "int32"], every=43)
    finally:
        torch.set_num_threads(threads)
    assert sum(summary.calls for summary in found.summaries if summary.config == DEFAULT) > 30
    assert not found.more
