"""How often the package compiles, that what it compiled is what runs, and that it computes the same."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
import torch
from support import EAGER, assert_same, guarded_entries, specializations
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.types import Number

import dispatch_compile as dc

pytestmark = [pytest.mark.long, pytest.mark.run_once]

TOKENS = (2, 7, 64, 1000, 4096)


def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


SHIPPED = {
    "rms_norm": lambda tokens: (random(tokens, 16), random(16), 1e-6),
    "fused_add_rms_norm": lambda tokens: (random(tokens, 16), random(tokens, 16) + 1, None, 1e-6),
    "silu_and_mul": lambda tokens: (random(tokens, 16),),
    "gelu_and_mul": lambda tokens: (random(tokens, 16), "tanh"),
    "quant_fp8_static": lambda tokens: (random(tokens, 16), torch.tensor([0.02])),
    "quant_fp8_per_token": lambda tokens: (random(tokens, 16),),
    "quant_fp8_per_group": lambda tokens: (random(tokens, 256),),
    "concat_quant_fp8": lambda tokens: (random(tokens, 2, 8), random(tokens, 2, 4), torch.tensor([0.02])),
    "silu_and_mul_quant_fp8_per_token": lambda tokens: (random(tokens, 16),),
    "silu_and_mul_quant_fp8_per_group": lambda tokens: (random(tokens, 256),),
    "rms_norm_quant_fp8_per_token": lambda tokens: (random(tokens, 16), random(16), 1e-6),
    "rms_norm_quant_fp8_per_group": lambda tokens: (random(tokens, 256), random(256), 1e-6),
    "fused_add_rms_norm_quant_fp8_per_token": lambda tokens: (random(tokens, 16), random(tokens, 16) + 1, None, 1e-6),
    "fused_add_rms_norm_quant_fp8_per_group": lambda tokens: (
        random(tokens, 256),
        random(tokens, 256) + 1,
        random(256),
        1e-6,
    ),
}


def assert_close(actual, expected) -> None:
    """Equal but for the order of float operations: one step of float8, a few of anything wider."""
    if isinstance(expected, Tensor) and expected.dtype == torch.float8_e4m3fn:
        assert_same(actual, expected, rtol=0.13, atol=0.01)
    elif isinstance(expected, tuple):
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other)
    else:
        assert_same(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", dc.ops.__all__)
def test_one_compilation_for_all_token_counts(name):
    op, mode = getattr(dc.ops, name), dc.DispatchCompileMode()
    compiles = []
    for tokens in (*TOKENS, 1, 0):
        arguments = SHIPPED[name](tokens)
        expected = op(*arguments)
        with mode:
            assert_close(op(*arguments), expected)
        compiles.append(mode.cache.stats().compiles)
    assert compiles == [1, 1, 1, 1, 1, 2, 3]
    assert mode.cache.stats().hits == len(compiles)
    assert mode.cache.stats().fallbacks == 0


@pytest.mark.parametrize("tokens", list(itertools.permutations((0, 1, 2, 7))))
def test_order_of_token_counts_does_not_matter(tokens, counted):
    mode = dc.DispatchCompileMode(config=EAGER)
    for _ in range(2):
        for count in tokens:
            x = random(count, 3)
            expected = counted(x)
            with mode:
                assert_same(counted(x), expected)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (3, 8)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_rows_without_elements(backend, counted):
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend=backend))
    for tokens in (2, 5, 1, 0, 2):
        x = random(tokens, 0)
        expected = counted(x)
        with mode:
            assert_same(counted(x), expected)
    assert mode.cache.stats().hits == 5


# ---- Reuse


def test_no_more_after_leaving_and_entering_again(counted):
    mode, x = dc.DispatchCompileMode(config=EAGER), random(4, 3)
    for _ in range(3):
        with mode:
            counted(x)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 3)


def test_no_more_for_a_new_mode_on_the_same_cache(counted):
    cache, x = dc.NativeCache(), random(4, 3)
    for _ in range(3):
        with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), cache=cache):
            counted(x)
    assert (cache.stats().compiles, cache.stats().hits, len(cache)) == (1, 3, 1)


def test_two_configurations_share_nothing(define_ir_op):
    graphs: dict[str, list[torch.fx.GraphModule]] = {"one": [], "other": []}
    calls: list[str] = []

    def config(name: str) -> dc.CompileConfig:
        def backend(graph, inputs):
            graphs[name].append(graph)

            def run(*tensors):
                calls.append(name)
                return graph(*tensors)

            return run

        return dc.CompileConfig(backend=backend)

    def double(x: Tensor) -> Tensor:
        return x * 2

    op, cache, x = define_ir_op(double), dc.NativeCache(), random(4, 3)
    modes = [dc.DispatchCompileMode(config=config(name), cache=cache) for name in graphs]
    for mode in modes:
        with mode:
            op(x)
    calls.clear()  # new code is tried out before it is used
    for mode in modes * 2:
        with mode:
            op(x)
    assert calls == ["one", "other", "one", "other"]
    assert [len(made) for made in graphs.values()] == [1, 1]
    assert (cache.stats().compiles, len(cache)) == (2, 1)


def test_cleared_cache_compiles_again(counted):
    mode, x = dc.DispatchCompileMode(config=EAGER), random(4, 3)
    with mode:
        counted(x)
        mode.cache.clear()
        assert len(mode.cache) == 0
        counted(x)
        counted(x)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (2, 3)


# ---- Proof that the compiled code runs


def test_python_of_the_implementation_does_not_run_again(counted):
    mode, x = dc.DispatchCompileMode(), random(4, 8)
    with mode:
        counted(x)
        runs = counted.python_runs
        for tokens in TOKENS:
            counted(random(tokens, 8))
    assert counted.python_runs == runs
    assert mode.cache.stats().hits == 1 + len(TOKENS)


def test_generated_code_is_one_fused_kernel():
    mode, x = dc.DispatchCompileMode(), random(4, 16)
    with mode:
        dc.ops.silu_and_mul(x)
    (specialization,) = specializations(mode, dc.ops.silu_and_mul)
    source = specialization.code.source
    kernels = {word.split("(")[0] for word in source.split() if word.startswith(("cpp_fused_", "triton_"))}
    assert len(kernels) == 1, kernels
    assert "silu" in kernels.pop()
    assert specialization.code.symbolic_shapes == "[s0, 16]"


@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_constants_are_in_the_generated_code(tokens, define_ir_op):
    def affine(x: Tensor) -> Tensor:
        factors, offset = torch.tensor([0.5, 1.5, -2.0], dtype=x.dtype), torch.tensor(7)
        factors.neg_()
        return x * factors + offset

    op, mode, x = define_ir_op(affine), dc.DispatchCompileMode(), random(tokens, 3)
    expected = op(x)
    with mode:
        for _ in range(2):
            assert_close(op(x), expected)
    (specialization,) = specializations(mode, op)
    inputs = int(tokens > 1) + 1
    assert specialization.code.call.count(",") + 1 == inputs
    if tokens:
        assert specialization.code.source.count("cpp_fused_") > 0
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 2)


def test_inductor_is_asked_once():
    mode, x = dc.DispatchCompileMode(), random(4, 24)

    def calls() -> None:
        with mode:
            for _ in range(3):
                dc.ops.rms_norm(x, None, 1e-5)

    _, sources = run_and_get_code(calls)
    assert len(sources) == 1
    assert mode.cache.stats().compiles == 1


def test_the_generated_code_is_what_runs():
    """Replace the compiled callable by another: the calls must notice."""
    mode, x = dc.DispatchCompileMode(config=_constant_config()), random(4, 16)
    with mode:
        assert_same(dc.ops.silu_and_mul(x), torch.full((4, 8), 42.0))


def _constant_config() -> dc.CompileConfig:
    return dc.CompileConfig(backend=lambda graph, inputs: lambda *args: [torch.full((4, 8), 42.0)])


# ---- What specializes


def _layouts() -> dict[str, Tensor]:
    return {
        "contiguous": random(6, 16),
        "slice of rows": random(6, 48)[:, 16:32],
        "every other row": random(12, 16)[::2],
        "column-major": random(16, 6).t(),
        "broadcast rows": random(1, 16).expand(6, 16),
        "broadcast columns": random(6, 1).expand(6, 16),
        "misaligned": random(97)[1:].view(6, 16),
        "three dimensions": random(6, 2, 16),
        "four dimensions, permuted": random(3, 6, 2, 16).permute(1, 0, 2, 3),
    }


@pytest.mark.parametrize("layout", list(_layouts()))
def test_layouts(layout):
    x, mode = _layouts()[layout], dc.DispatchCompileMode()
    expected = dc.ops.silu_and_mul(x)
    with mode:
        for _ in range(2):
            assert_close(dc.ops.silu_and_mul(x), expected)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 2)


def test_row_stride_of_a_fused_projection_serves_all_token_counts():
    mode = dc.DispatchCompileMode()
    for tokens in TOKENS:
        x = random(tokens, 48)[:, 16:32]
        expected = dc.ops.silu_and_mul(x)
        with mode:
            assert_close(dc.ops.silu_and_mul(x), expected)
    assert mode.cache.stats().compiles == 1


def test_column_major_serves_all_token_counts(counted):
    mode = dc.DispatchCompileMode(config=EAGER)
    for tokens in TOKENS:
        x = random(16, tokens).t()
        expected = counted(x)
        with mode:
            assert_same(counted(x), expected)
    assert mode.cache.stats().compiles == 1


def test_every_layout_on_one_cache(counted):
    mode = dc.DispatchCompileMode(config=EAGER)
    for _ in range(2):
        for x in _layouts().values():
            expected = counted(x)
            with mode:
                assert_same(counted(x), expected)
    assert mode.cache.stats().hits == 2 * len(_layouts())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    x, weight, mode = random(6, 16, dtype=dtype), random(16, dtype=dtype), dc.DispatchCompileMode()
    expected = dc.ops.rms_norm(x, weight, 1e-6)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-6}[dtype]
    with mode:
        assert_same(dc.ops.rms_norm(x, weight, 1e-6), expected, rtol=tolerance, atol=tolerance)
    assert mode.cache.stats().hits == 1


def test_dtypes_never_share(counted):
    mode = dc.DispatchCompileMode(config=EAGER)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.complex64)
    for _ in range(2):
        for dtype in dtypes:
            x = random(4, 3).to(dtype)
            expected = counted(x)
            with mode:
                assert_same(counted(x), expected)
    assert mode.cache.stats().compiles == len(dtypes)


def test_none_and_tensor_never_share():
    mode, x, weight = dc.DispatchCompileMode(config=EAGER), random(4, 3), random(3)
    for _ in range(2):
        for given in (None, weight):
            expected = dc.ops.rms_norm(x, given, 1e-6)
            with mode:
                assert_same(dc.ops.rms_norm(x, given, 1e-6), expected)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (2, 4)


@pytest.fixture
def scaled(define_ir_op):
    def scaled(x: Tensor, by: Number) -> Tensor:
        return x + by if isinstance(by, bool) else x.floor() * by

    return define_ir_op(scaled)


@pytest.mark.parametrize(
    ("scalars", "compiles"),
    [
        ((True, 1, 1.0), 3),
        ((False, 0, 0.0, -0.0), 4),
        ((float("nan"), float("inf"), float("-inf"), 1.0), 3),  # the code of the third takes any
        ((1 + 0j, 1.0, 1, complex(1, -0.0), complex(-0.0, 1)), 5),
        ((2**53, float(2**53), 2**53 + 1), 3),
    ],
    ids=str,
)
def test_scalars_that_look_alike_never_share(scalars, compiles, scaled):
    mode, x = dc.DispatchCompileMode(config=EAGER), torch.arange(1, 7).view(2, 3)
    for order in (scalars, scalars, scalars[::-1]):
        for scalar in order:
            expected = scaled(x, scalar)
            with mode:
                assert_same(scaled(x, scalar), expected)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (compiles, 3 * len(scalars))


def test_lists_specialize_by_length_and_items(define_ir_op):
    def weighted(xs: list[Tensor], weights: list[float], dims: list[int] | None = None) -> Tensor:
        total = sum(x * weight for x, weight in zip(xs, weights, strict=True))
        return total if dims is None else total.sum(dims)

    op, mode, x = define_ir_op(weighted), dc.DispatchCompileMode(config=EAGER), random(4, 3)
    assert op.activations == ["xs"]
    variants = [
        ([x], [0.5]),
        ([x], [-0.5]),
        ([x, x + 1], [1.0, 2.0]),
        ([x, x + 1], [2.0, 1.0]),
        ([x, x + 1], [2.0, 1.0], [1]),
        ([x, x + 1], [2.0, 1.0], [0, 1]),
    ]
    for _ in range(2):
        for arguments in variants:
            expected = op(*arguments)
            with mode:
                assert_same(op(*arguments), expected)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (6, 12)
    with mode:
        longer = [random(9, 3), random(9, 3)]
        op(longer, [1.0, 2.0])
    assert mode.cache.stats().compiles == 6


def test_list_of_optional_tensors(define_ir_op):
    from typing import Optional  # torch's schema inference knows list[Optional[...]] only in this spelling

    def total(xs: list[Optional[Tensor]]) -> Tensor:  # noqa: UP045
        return sum(x for x in xs if x is not None)

    total.__annotations__ = {"xs": list[Optional[Tensor]], "return": Tensor}  # noqa: UP045
    op, mode, x = define_ir_op(total), dc.DispatchCompileMode(config=EAGER), random(4, 3)
    for arguments in ([x, None], [None, x], [x, x + 1], [x]) * 2:
        expected = op(arguments)
        with mode:
            assert_same(op(arguments), expected)
    assert mode.cache.stats().compiles == 4


def test_strings_dtypes_and_defaults(define_ir_op):
    def cast(x: Tensor, dtype: torch.dtype, how: str = "floor", shift: int = 1) -> Tensor:
        return getattr(x, how)().to(dtype) + shift

    op, mode, x = define_ir_op(cast), dc.DispatchCompileMode(config=EAGER), random(4, 3)
    calls = [
        ((x, torch.float64), {}),
        ((x, torch.float64, "floor", 1), {}),
        ((x, torch.float64), {"shift": 1}),
        ((x, torch.int32), {}),
        ((x, torch.float64, "ceil"), {}),
        ((x, torch.float64), {"shift": 2}),
    ]
    for _ in range(2):
        for args, kwargs in calls:
            expected = op(*args, **kwargs)
            with mode:
                assert_same(op(*args, **kwargs), expected)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (4, 12)


def test_keyword_only_parameters_of_a_foreign_op(define_opaque):
    def scale_by(x: Tensor, *, by: float, bias: Tensor | None = None) -> Tensor:
        return x * by if bias is None else x * by + bias

    op, x, mode = define_opaque(scale_by), random(4, 3), dc.DispatchCompileMode(config=EAGER)
    handle = dc.register_native(op, scale_by)
    try:
        for keywords in ({"by": 2.0}, {"by": 3.0}, {"by": 2.0, "bias": random(3)}, {"bias": random(3), "by": 2.0}):
            expected = op(x, **keywords)
            with mode:
                assert_same(op(x, **keywords), expected)
        assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (3, 4)
    finally:
        handle.remove()


def test_several_results_and_lists_of_results(define_ir_op):
    def split(x: Tensor) -> list[Tensor]:
        return [x[:, :1] + 1, x[:, 1:] * 2]

    op, mode = define_ir_op(split), dc.DispatchCompileMode(config=EAGER)
    for tokens in (2, 5):
        x = random(tokens, 3)
        expected = op(x)
        with mode:
            assert_same(op(x), expected)
    assert mode.cache.stats().hits == 2


# ---- Guards on the token count


def _branching(x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] > 3 else x * 3


@pytest.mark.parametrize("order", list(itertools.permutations((2, 3, 4, 100))), ids=str)
def test_branch_on_the_token_count(order, define_ir_op):
    op, mode = define_ir_op(_branching), dc.DispatchCompileMode(config=EAGER)
    for _ in range(2):
        for tokens in order:
            x = random(tokens, 3)
            with mode:
                assert_same(op(x), x * 2 if tokens > 3 else x * 3)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (2, 8)


def test_branch_on_the_token_count_with_inductor(define_ir_op):
    op, mode = define_ir_op(_branching), dc.DispatchCompileMode()
    for tokens in (4, 2, 100, 3):
        x = random(tokens, 3)
        with mode:
            assert_same(op(x), x * 2 if tokens > 3 else x * 3)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (2, 4)


def test_divisibility_of_the_token_count(define_ir_op):
    def pairs(x: Tensor) -> Tensor:
        return x.view(-1, 2, 3).sum(1) if x.shape[0] % 2 == 0 else x * 2

    op, mode = define_ir_op(pairs), dc.DispatchCompileMode(config=EAGER)
    for tokens in (6, 7, 8, 9, 100, 101):
        x = random(tokens, 3)
        expected = op(x)
        with mode:
            assert_same(op(x), expected)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (2, 6)


def test_guards_that_divide_by_zero_do_not_hold(define_ir_op):
    def far(x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 5 and 12 // (x.shape[0] - 5) > 1 else x * 3

    op, mode = define_ir_op(far), dc.DispatchCompileMode(config=EAGER)
    for tokens in (7, 5, 100, 5, 7):
        x = random(tokens, 3)
        with mode:
            assert_same(op(x), x * 2 if tokens == 7 else x * 3)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (3, 5)


def test_fixed_token_count_compiles_for_each(define_ir_op):
    def fixed(x: Tensor) -> Tensor:
        return x * int(x.shape[0])

    op, mode = define_ir_op(fixed), dc.DispatchCompileMode(config=EAGER)
    for tokens in (5, 6, 5, 7, 6):
        x = random(tokens, 3)
        with mode:
            assert_same(op(x), x * tokens)
    assert mode.cache.stats().hits == 5


def test_activations_of_equal_and_different_token_counts(define_ir_op):
    def pad(x: Tensor, x_other: Tensor) -> Tensor:
        return torch.cat([x, x_other * 2]) if x.shape[0] != x_other.shape[0] else x + x_other

    op, mode = define_ir_op(pad), dc.DispatchCompileMode(config=EAGER)
    for first, second in ((4, 4), (4, 5), (6, 6), (5, 4), (7, 9), (1, 4), (4, 1), (0, 4), (4, 4), (1, 1)):
        x, other = random(first, 3), random(second, 3) + 1
        expected = op(x, other)
        with mode:
            assert_same(op(x, other), expected)
    assert mode.cache.stats().hits == 10


def test_wrong_sizes_raise_as_without_the_mode(counted, define_ir_op):
    def add(x: Tensor, x_other: Tensor) -> Tensor:
        return x + x_other

    op, mode = define_ir_op(add), dc.DispatchCompileMode(config=EAGER)
    with mode:
        op(random(4, 3), random(4, 3))
    with pytest.raises(RuntimeError, match="must match the size") as expected:
        op(random(4, 3), random(5, 3))
    with mode, pytest.raises(RuntimeError, match="must match the size") as actual:
        op(random(4, 3), random(5, 3))
    assert str(actual.value) == str(expected.value)


# ---- Growth


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_ten_thousand_calls_at_500_token_counts_grow_nothing():
    mode, inputs = dc.DispatchCompileMode(), random(502, 16)

    def calls(n: int) -> None:
        with mode:
            for i in range(n):
                dc.ops.silu_and_mul(inputs[: 2 + i % 500])

    calls(1000)
    gc.collect()
    before = _resident_mb()
    calls(10_000)
    gc.collect()
    assert _resident_mb() - before < 4
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 11_000)
    assert len(mode.cache) == 1
    assert len(guarded_entries(mode, dc.ops.silu_and_mul)) == 1
