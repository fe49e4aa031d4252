"""Native implementations that do what compiled code cannot, or hardly: what eager does comes out, or a clear error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from support import EAGER, EAGER_OR_NATIVE, assert_same, outcome
from torch import Tensor

import dispatch_compile as dc


@pytest.fixture
def mode():
    return dc.DispatchCompileMode(config=EAGER, trace=True)


@pytest.fixture
def forgiving():
    return dc.DispatchCompileMode(config=EAGER_OR_NATIVE, trace=True)


def reasons(mode: dc.DispatchCompileMode, action: str = "aside") -> set[str]:
    """Why calls did not run compiled; fails if any did, or did so otherwise than in this way."""
    stats = mode.cache.stats()
    assert stats.hits == 0
    assert (stats.asides if action == "aside" else stats.fallbacks) == len(mode.trace.events) > 0
    assert {event.action for event in mode.trace.events} == {action}
    return {event.reason for event in mode.trace.events}


# ---- Traceable, but compiled code would not behave the same: native code runs, whatever on_failure says


def test_changes_an_argument(mode, define_ir_op):
    def careless(x: Tensor) -> Tensor:
        x.add_(1)
        return x * 2

    op, x = define_ir_op(careless), torch.zeros(4, 3)
    with mode:
        for step in (1, 2, 3):
            assert_same(op(x), torch.full((4, 3), 2.0 * step))
            assert_same(x, torch.full((4, 3), float(step)))
    assert reasons(mode) == {"the implementation changes its argument x, which is not declared as mutated"}


def test_changes_an_argument_through_a_view(mode, define_ir_op):
    def careless(x: Tensor) -> Tensor:
        x[0].fill_(7)
        return x * 2

    op, x = define_ir_op(careless), torch.zeros(4, 3)
    with mode:
        op(x)
    assert x[0].tolist() == [7, 7, 7]
    assert reasons(mode) == {"the implementation changes its argument x, which is not declared as mutated"}


def test_resizes_or_sets_nothing_of_its_own(mode, define_ir_op):
    def workspace(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        total.add_(x).mul_(2)
        total[:, 0] = 0
        return total

    op, x = define_ir_op(workspace), torch.randn(4, 3)
    expected = op(x)
    with mode:
        assert_same(op(x), expected)
    assert mode.cache.stats().hits == 1, "changing a tensor of its own is not changing an argument"


def test_returns_an_argument(mode, define_ir_op):
    def same(x: Tensor) -> Tensor:
        return x

    op, x = define_ir_op(same), torch.randn(4, 3)
    with mode:
        results = [op(x) for _ in range(2)]
    assert [result is x for result in results] == [True] * 2
    assert mode.cache.stats().hits == 2


def test_returns_an_argument_for_some_calls_only(mode, define_ir_op):
    def contiguous(x: Tensor) -> Tensor:
        return x.contiguous()

    op, x = define_ir_op(contiguous), torch.randn(4, 3)
    with mode:
        for _ in range(2):
            assert op(x).data_ptr() == x.data_ptr()
            assert_same(op(x.t()), x.t().contiguous())
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (2, 4)


@pytest.mark.parametrize("view", ["view", "slice", "transpose", "detach", "alias in a tuple"])
def test_returns_a_view_of_an_argument(view, mode, define_ir_op):
    def viewing(x: Tensor) -> tuple[Tensor, Tensor]:
        views = {
            "view": lambda: x.view(-1),
            "slice": lambda: x[1:],
            "transpose": lambda: x.t(),
            "detach": lambda: x.detach(),
            "alias in a tuple": lambda: x.view_as(x),
        }
        return x * 2, views[view]()

    op, x = define_ir_op(viewing), torch.randn(4, 3)
    with mode:
        for _ in range(2):
            _, result = op(x)
            result.fill_(5)
    assert (x == 5).any()
    assert reasons(mode) == {"result 1 shares memory with argument x"}


def test_results_that_share_memory(mode, define_ir_op):
    def twins(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y, y[0]

    op = define_ir_op(twins)
    with mode:
        for _ in range(2):
            whole, row = op(torch.randn(4, 3))
            row.fill_(5)
            assert whole[0].tolist() == [5, 5, 5]
    assert reasons(mode) == {"result 1 shares memory with result 0"}


def _within(context: AbstractContextManager[Any], fn: Callable[[], Tensor]) -> Tensor:
    with context:
        return fn()


UNUSUAL = {
    "requires grad": lambda x: (x * 2).requires_grad_(),
    "is a Parameter": lambda x: torch.nn.Parameter(x * 2, requires_grad=False),
    "is an inference tensor": lambda x: _within(torch.inference_mode(), lambda: x * 2),
    "is a lazy conjugate or negative": lambda x: (x * 2j).conj(),
    "is a zero tensor without storage": lambda x: torch._efficientzerotensor(x.shape),
    "is on the meta device": lambda x: torch.empty(3, device="meta"),
}


@pytest.mark.parametrize("reason", UNUSUAL)
def test_returns_an_unusual_tensor(reason, mode, define_ir_op):
    def unusual(x: Tensor) -> Tensor:
        return UNUSUAL[reason](x)

    def seen(result: Tensor) -> tuple[Any, ...]:
        asked = ("requires_grad", "is_inference", "is_conj", "_is_zerotensor", "layout", "device", "dtype", "shape")
        return type(result), *(value() if callable(value := getattr(result, name)) else value for name in asked)

    op, x = define_ir_op(unusual), torch.ones(4, 3)
    expected = seen(op(x))
    with mode:
        assert [seen(op(x)) for _ in range(2)] == [expected] * 2
    assert reasons(mode) == {f"result 0 {reason}"}


def test_leaves_inference_mode(mode, define_ir_op):
    def leaving(x: Tensor) -> Tensor:
        return _within(torch.inference_mode(False), lambda: x * 2)

    op, x = define_ir_op(leaving), torch.ones(4, 3)
    with torch.inference_mode(), mode:
        assert [op(x).is_inference() for _ in range(2)] == [False] * 2
    assert reasons(mode) == {"result 0 is made outside of inference mode"}


def test_makes_an_argument_require_grad(mode, define_ir_op):
    def greedy(x: Tensor) -> Tensor:
        x.requires_grad_()
        return x.detach() * 2

    op = define_ir_op(greedy)
    with mode, torch.no_grad():
        for _ in range(2):
            x = torch.ones(4, 3)
            op(x)
            assert x.requires_grad
    assert reasons(mode) == {"the implementation changes whether its argument x requires grad"}


def _answering(value: Any) -> Callable[..., Any]:
    def answer(x: Tensor) -> Any:
        return value

    answer.__annotations__ = {"x": Tensor, "return": type(value)}
    return answer


@pytest.mark.parametrize("value", [4, True, 0.5])
def test_returns_no_tensor(value, mode, define_ir_op):
    op = define_ir_op(_answering(value))
    with mode:
        for _ in range(2):
            result = op(torch.randn(4, 3))
            assert (type(result), result) == (type(value), value)
    assert mode.cache.stats().hits == 2


def test_returns_a_tensor_and_a_number(mode, define_ir_op):
    def counted_rows(x: Tensor) -> tuple[Tensor, int]:
        return x * 2, x.shape[0]

    op = define_ir_op(counted_rows)
    with mode:
        for tokens in (4, 5, 4):
            assert op(torch.ones(tokens, 3))[1] == tokens
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 3)


def test_returns_a_number_that_is_computed(mode, define_ir_op):
    def counted_elements(x: Tensor) -> tuple[Tensor, int]:
        return x * 2, x.shape[0] * 3

    op = define_ir_op(counted_elements)
    with mode:
        for tokens in (4, 5, 4):
            assert op(torch.ones(tokens, 3))[1] == 3 * tokens
    assert reasons(mode) == {"the implementation returns a number that depends on a size or on a number"}


def test_returns_nothing(mode, define_ir_op):
    """It is called for what it does beside, which no graph has."""
    seen = []

    def nothing(x: Tensor) -> None:
        seen.append(x.shape[0])

    op = define_ir_op(nothing)
    with mode:
        for tokens in (4, 5, 4):
            assert op(torch.ones(tokens, 3)) is None
    assert [int(n) for n in seen][-1] == 4
    assert reasons(mode) == {
        "the implementation returns nothing and changes no argument: what it does is not in its graph"
    }


DRAWS = {
    "rand_like": lambda x: torch.rand_like(x),
    "randn": lambda x: x + torch.randn(3),
    "dropout": lambda x: torch.nn.functional.dropout(x, 0.5, training=True),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.5),
    "randperm": lambda x: x[:, torch.randperm(3)],
    "multinomial": lambda x: torch.multinomial(torch.ones(3), 2).float(),
}


@pytest.mark.parametrize("draw", list(DRAWS))
def test_draws_random_numbers(draw, mode, define_ir_op):
    def noisy(x: Tensor) -> Tensor:
        return DRAWS[draw](x)

    op, x = define_ir_op(noisy), torch.ones(4, 3)

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return op(x), op(x), torch.rand(1)

    expected = run()
    with mode:
        assert_same(run(), expected)
    (reason,) = reasons(mode)
    assert reason.startswith("the implementation draws random numbers (aten.")


# ---- Not capturable: eager's behaviour with on_failure="native", a CompileError with "raise"

CONSTANT = torch.tensor([1.0, 2.0, 3.0])


def reads_an_item(x: Tensor) -> Tensor:
    return x * x.sum().item()


def branches_on_a_value(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x * 3


def finds_nonzero(x: Tensor) -> Tensor:
    return x.nonzero()


def masks(x: Tensor) -> Tensor:
    return x[x > 0]


def reads_a_global_tensor(x: Tensor) -> Tensor:
    return x * CONSTANT


def goes_through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() * 2)


def reads_a_list(x: Tensor) -> Tensor:
    return x * x[0].tolist()[0]


NOT_CAPTURABLE = [
    reads_an_item,
    branches_on_a_value,
    finds_nonzero,
    masks,
    reads_a_global_tensor,
    goes_through_numpy,
    reads_a_list,
]


@pytest.mark.parametrize("native", NOT_CAPTURABLE)
def test_not_capturable_and_native(native, forgiving, define_ir_op):
    op = define_ir_op(native)
    inputs = [torch.randn(4, 3), -torch.ones(5, 3), torch.ones(4, 3)]
    expected = [op(x) for x in inputs]
    with forgiving, pytest.warns(dc.DispatchCompileWarning, match="it runs eagerly") as caught:
        assert_same([op(x) for x in inputs], expected)
    assert len([w for w in caught if w.category is dc.DispatchCompileWarning]) == 1
    (reason,) = reasons(forgiving, "eager")
    assert reason in str(caught[0].message)
    assert reason.startswith(f"the 'native' implementation of {op.torch_op.name()} cannot be captured: ")


@pytest.mark.parametrize("native", NOT_CAPTURABLE)
def test_not_capturable_and_raise(native, mode, define_ir_op):
    op, x = define_ir_op(native), torch.randn(4, 3)
    errors = []
    with mode:
        for _ in range(2):
            with pytest.raises(dc.CompileError, match="cannot be captured: ") as error:
                op(x)
            errors.append(error.value)
    assert str(errors[0]) == str(errors[1])
    for named in (op.torch_op.name(), "'native'"):
        assert named in str(errors[0])
    op(x)  # outside, nothing happened


def test_warned_about_once_for_an_implementation_and_cause(forgiving, define_ir_op):
    op = define_ir_op(reads_an_item)
    with forgiving, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in (torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 7), torch.ones(4, 3, dtype=torch.float64)):
            op(x)
    assert len(caught) == 1
    assert forgiving.cache.stats().fallbacks == 4


def test_backend_that_fails(define_ir_op):
    def broken(graph, inputs):
        raise ValueError("no such instruction\nsecond line")

    def double(x: Tensor) -> Tensor:
        return x * 2

    op, x = define_ir_op(double), torch.randn(4, 3)
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend=broken, on_failure="raise"))
    with mode, pytest.raises(dc.CompileError, match=r"cannot be compiled .*ValueError: no such instruction$") as error:
        op(x)
    assert isinstance(error.value.__cause__, ValueError)
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend=broken, on_failure="native"))
    with mode, pytest.warns(dc.DispatchCompileWarning, match="no such instruction"):
        assert_same(op(x), x * 2)
    assert mode.cache.stats().fallbacks == 1


# ---- Errors of the implementation itself


class CustomError(Exception):
    pass


def raises_its_own(x: Tensor) -> Tensor:
    raise CustomError("not today")


def raises_for_a_shape(x: Tensor) -> Tensor:
    if x.shape[0] > 3:
        raise ValueError(f"too many tokens: {x.shape[0]}")
    return x * 2


def raises_for_many(x: Tensor) -> Tensor:
    if x.shape[0] > 100:
        raise ValueError("too many tokens")
    return x * 2


def raises_inside_torch(x: Tensor) -> Tensor:
    return x.view(2, 2)


@pytest.mark.parametrize("config", [EAGER, EAGER_OR_NATIVE], ids=["raise", "native"])
@pytest.mark.parametrize("native", [raises_its_own, raises_for_a_shape, raises_for_many, raises_inside_torch])
def test_error_of_the_implementation(native, config, define_ir_op):
    """Also where some token counts are refused and others are not, in any order."""
    op, mode = define_ir_op(native), dc.DispatchCompileMode(config=config)
    for tokens in (5, 2, 3, 7, 500, 5):
        x = torch.randn(tokens, 3)
        expected = outcome(op, x)
        with mode:
            assert_same(outcome(op, x), expected)


def test_wrong_result_type_raises_as_without_the_mode(mode, define_ir_op):
    def liar(x: Tensor) -> Tensor:
        return [x * 2, x * 3]  # two tensors where the schema says one

    op, x = define_ir_op(liar), torch.randn(4, 3)
    expected = outcome(op, x)
    assert isinstance(expected, RuntimeError)
    with mode:
        for _ in range(2):
            assert_same(outcome(op, x), expected)


def test_index_out_of_range_raises_as_without_the_mode(define_ir_op):
    def lookup(x: Tensor, table: Tensor) -> Tensor:
        return table[x] * 2

    op, table, good, bad = define_ir_op(lookup), torch.randn(3, 4), torch.tensor([0, 2]), torch.tensor([0, 3])
    expected = outcome(op, bad, table)
    assert isinstance(expected, IndexError)
    mode = dc.DispatchCompileMode(config=EAGER)
    with mode:
        op(good, table)
        assert_same(outcome(op, bad, table), expected)
    assert mode.cache.stats().hits >= 1


@pytest.mark.parametrize("tokens", [0, 4])
def test_dtype_without_a_kernel_raises_as_without_the_mode(tokens, define_ir_op):
    def difference(x: Tensor, x_other: Tensor) -> Tensor:
        return x - x_other

    op, x, mode = define_ir_op(difference), torch.ones(tokens, 3, dtype=torch.bool), dc.DispatchCompileMode()
    expected = outcome(op, x, x.clone())
    assert isinstance(expected, RuntimeError)
    with mode:
        for _ in range(2):
            assert_same(outcome(op, x, x.clone()), expected)


def test_raises_where_results_have_no_elements(define_ir_op):
    def quotients(x: Tensor, x_other: Tensor) -> Tensor:
        return (x // x_other)[4:]

    op, x, mode = define_ir_op(quotients), torch.tensor([4, 5, 6]), dc.DispatchCompileMode()
    expected = outcome(op, x, x - 5)
    assert isinstance(expected, RuntimeError)
    with mode:
        for _ in range(2):
            assert_same(op(x, x - 3), torch.empty(0, dtype=torch.int64))
            assert_same(outcome(op, x, x - 5), expected)
    assert mode.cache.stats().hits == 2


# ---- Implementations that look at more of an argument than its values


LOOKS = {
    "requires_grad": lambda x: x.requires_grad,
    "is_contiguous": lambda x: x.is_contiguous(),
    "is_inference": lambda x: x.is_inference(),
    "is_leaf": lambda x: x.is_leaf,
    "grad mode": lambda x: torch.is_grad_enabled(),
    "inference mode": lambda x: torch.is_inference_mode_enabled(),
    "default dtype": lambda x: torch.get_default_dtype() is torch.float64,
    "deterministic": lambda x: torch.are_deterministic_algorithms_enabled(),
    "compiling": lambda x: torch.compiler.is_compiling(),
}


@pytest.mark.parametrize("look", list(LOOKS))
def test_branches_on_what_it_sees(look, define_ir_op):
    def nosy(x: Tensor) -> Tensor:
        return x * 2 if LOOKS[look](x) else x * 3

    op, mode = define_ir_op(nosy), dc.DispatchCompileMode(config=EAGER_OR_NATIVE)
    plain, offset = torch.randn(4, 4), torch.randn(8, 4)[4:]
    parameter = torch.nn.Parameter(torch.randn(4, 4))
    with torch.inference_mode():
        inference = torch.randn(4, 4)
    inputs = [plain, offset, plain.t(), parameter, parameter.detach(), inference, plain]
    contexts = [torch.no_grad, torch.enable_grad, torch.inference_mode, _deterministic, _double, torch.no_grad]
    for context in contexts:
        for x in inputs:
            with warnings.catch_warnings(), context():
                warnings.simplefilter("ignore", dc.DispatchCompileWarning)
                expected = outcome(op, x)
                with mode:
                    assert_same(outcome(op, x), expected)


class _deterministic:  # noqa: N801 - used as torch's own contexts are
    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


class _double:  # noqa: N801
    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(torch.float32)
