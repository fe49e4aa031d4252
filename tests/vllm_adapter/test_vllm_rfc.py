"""The cases of vLLM's draft for compiling native implementations (PR #38775 for RFC #38744), with a mode in the place
of its ``set_priority(..., compile=True)``.

What the draft shows by wrapper objects is shown here by the trace, and by counting how often the implementations run
as Python: once for each capture, and on every call that is not compiled.
"""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs the real vLLM")

import torch
import vllm.ir
from support import EAGER
from torch import Tensor
from vllm.ir.op import IrOp
from vllm_support import OpaqueOps

import dispatch_compile as dc

pytestmark = pytest.mark.vllm


class Midpoint:
    """An op of ``vllm.ir`` with two activations and a scalar, and the calls that ran its implementations as Python."""

    def __init__(self) -> None:
        self.python_runs: list[str] = []

        def rfc_midpoint(x_low: Tensor, x_high: Tensor, weight: float = 0.5) -> Tensor:
            self.python_runs.append("native")
            return x_low + (x_high - x_low) * weight

        self.op = vllm.ir.register_op(rfc_midpoint)

    def register(self, provider: str, offset: float) -> None:
        """Another implementation, whose results tell that it ran."""

        def midpoint(x_low: Tensor, x_high: Tensor, weight: float = 0.5) -> Tensor:
            self.python_runs.append(provider)
            return torch.lerp(x_low, x_high, weight) + offset

        self.op.register_impl(provider)(midpoint)


@pytest.fixture
def midpoint(monkeypatch):
    library = torch.library.Library("vllm_ir", "FRAGMENT")  # its own, to be taken away
    monkeypatch.setattr(vllm.ir.op, "vllm_ir_torch_lib", library)
    with vllm.ir.enable_torch_wrap(True):
        yield Midpoint()
    del IrOp.registry["rfc_midpoint"]
    library._destroy()


@pytest.fixture
def mode():
    return dc.DispatchCompileMode(config=EAGER, trace=True)


def arguments(tokens: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, 5, generator=generator), torch.randn(tokens, 5, generator=generator)


def expected(low: Tensor, high: Tensor, weight: float) -> Tensor:
    return low + (high - low) * weight


def test_scope(midpoint, mode):
    """Calls are compiled inside the mode alone, and give the same results inside and outside."""
    low, high = arguments()
    with midpoint.op.set_priority(["native"]):
        outside = midpoint.op(low, high, 0.25)
        assert midpoint.python_runs == ["native"]
        with mode:
            first, second = midpoint.op(low, high, 0.25), midpoint.op(low, high, 0.25)
        captured = len(midpoint.python_runs)
        again = midpoint.op(low, high, 0.25)
    assert [event.action for event in mode.trace.events] == ["compiled", "compiled"]
    assert [event.new for event in mode.trace.events] == [True, False]
    assert len(midpoint.python_runs) == captured + 1, "after the mode the op runs as Python again"
    for result in (outside, first, second, again):
        torch.testing.assert_close(result, expected(low, high, 0.25))


def test_no_recompilation_when_the_batch_size_changes(midpoint, mode):
    with mode:
        for tokens in (4, 10, 2, 1000):
            low, high = arguments(tokens)
            torch.testing.assert_close(midpoint.op(low, high, 3.0), expected(low, high, 3.0))
    assert mode.cache.stats().compiles == 1
    assert [event.specialization for event in mode.trace.events] == ["[s0, 5], [s0, 5]"] * 4


def test_nor_when_the_mode_is_entered_again(midpoint, mode):
    for tokens in (4, 10):
        with mode, midpoint.op.set_priority(["native"]):
            midpoint.op(*arguments(tokens), 3.0)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 2)


@pytest.mark.parametrize("how", ["torch.library.custom_op", "direct_register_custom_op"])
def test_inside_a_custom_op(midpoint, mode, how):
    def rfc_wrapped(x: Tensor, y: Tensor) -> Tensor:
        return midpoint.op(x, y, weight=3.0)

    ops = None
    if how == "torch.library.custom_op":
        wrapped = torch.library.custom_op("test_vllm_rfc_decorated::wrapped", rfc_wrapped, mutates_args=())
    else:
        ops = OpaqueOps("test_vllm_rfc")
        wrapped = ops.register(rfc_wrapped)
    low, high = arguments()
    with mode:
        result = wrapped(low, high)
    torch.testing.assert_close(result, expected(low, high, 3.0))
    [event] = mode.trace.events
    assert (event.op, event.action, event.depth) == ("vllm_ir::rfc_midpoint.default", "compiled", 1)
    assert len(mode.cache) == 1
    if ops is not None:
        ops.remove()


def test_another_implementation_that_may_be_compiled(midpoint):
    midpoint.register("other", offset=4.0)
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", providers=("native", "other")), trace=True)
    low, high = arguments()
    with midpoint.op.set_priority(["other", "native"]), mode:
        midpoint.op(low, high, 0.25)
        captured = len(midpoint.python_runs)
        result = midpoint.op(low, high, 0.25)
    torch.testing.assert_close(result, expected(low, high, 0.25) + 4)
    assert [(event.provider, event.action) for event in mode.trace.events] == [("other", "compiled")] * 2
    assert set(midpoint.python_runs) == {"other"}
    assert len(midpoint.python_runs) == captured, "the second call ran compiled code"


def test_an_implementation_that_may_not_be_compiled(midpoint, mode):
    """Providers are compiled only if the configuration lists them; ``native`` is."""
    midpoint.register("handwritten", offset=4.0)
    low, high = arguments()
    with midpoint.op.set_priority(["handwritten", "native"]), mode:
        results = [midpoint.op(low, high, 0.25) for _ in range(2)]
    for result in results:
        torch.testing.assert_close(result, expected(low, high, 0.25) + 4)
    assert midpoint.python_runs == ["handwritten", "handwritten"]
    assert [(event.provider, event.action) for event in mode.trace.events] == [("handwritten", "aside")] * 2
    assert mode.cache.stats().compiles == 0


def test_nested_scopes(midpoint, mode):
    """Priorities and modes nest in any order; leaving one brings back what was around it."""
    midpoint.register("handwritten", offset=4.0)
    low, high = arguments()
    actions = []

    def call() -> None:
        before = len(mode.trace.events)
        offset = 4 if midpoint.op.get_priority()[0] == "handwritten" else 0
        torch.testing.assert_close(midpoint.op(low, high, 0.25), expected(low, high, 0.25) + offset)
        actions.extend(event.action for event in mode.trace.events[before:])
        if len(mode.trace.events) == before:
            actions.append("not seen")

    with midpoint.op.set_priority(["native"]):
        call()
        with mode:
            call()
            with midpoint.op.set_priority(["handwritten", "native"]):
                call()
                with dc.DispatchCompileMode(config=EAGER, ops=[midpoint.op], cache=mode.cache):
                    call()
            call()
        call()
    assert actions == ["not seen", "compiled", "aside", "aside", "compiled", "not seen"]
    assert mode.cache.stats().compiles == 1


def test_the_default_value_of_a_scalar_and_the_same_value_given_share_code(midpoint, mode):
    low, high = arguments()
    with mode:
        assert torch.equal(midpoint.op(low, high), midpoint.op(low, high, weight=0.5))
    assert mode.cache.stats().compiles == 1
