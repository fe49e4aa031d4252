"""What ``mode.explain`` says is what then happens, and saying it changes nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from support import EAGER, EAGER_OR_NATIVE, guarded_entries, outcome
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import dispatch_compile as dc


@pytest.fixture
def mode():
    return dc.DispatchCompileMode(config=EAGER, trace=True)


@pytest.fixture
def scale(define_ir_op):
    """An IR op with providers: for one token, not supported on this machine, and for everything."""

    def explained_scale(x: Tensor, weight: Tensor, factor: float = 2.0) -> Tensor:
        return x * weight * factor

    op = define_ir_op(explained_scale, name="explained_scale")
    op.register_impl("decode", supports_args=lambda x, weight, factor=2.0: x.size(0) == 1)(explained_scale)
    op.register_impl("lacking", supported=False)(explained_scale)
    op.register_impl("other")(explained_scale)
    return op


@pytest.fixture
def plain_scale(define_ir_op):
    def explained_plain_scale(x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor

    return define_ir_op(explained_plain_scale, name="explained_plain_scale")


def x_of(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(tokens, 3, dtype=dtype)


# ---- What a person reads


def test_not_compiled_yet(mode, scale):
    assert_expected_inline(
        str(mode.explain(scale, x_of(4), weight=torch.ones(3), factor=3)),
        """\
dispatch_compile::explained_scale(t: f32[4, 3], t: f32[3], 3.0)
would be compiled first, then run compiled
implementation: native, since no priority is set
specialization: [s0, 3], [3]
  x: f32, shape [s0, 3], stride [3, 1], device cpu, requires_grad False, is_inference() False
  weight: f32, shape [3], stride [1], device cpu, requires_grad False, is_inference() False
  factor: 3.0
  inference mode off, grad mode on, and the rest of torch's global state
  sizes: 2 <= x.size(0)
guard:
  def call(args, kwargs):
      if len(args) != 3 or len(kwargs) != 0:
          return MISS
      a0, a1, a2, = args
      if not (type(a2) is value_2_type and a2 == value_2 and tensors_match(a0, a1) and not inference_mode() and not
          a0.is_inference() and not a1.is_inference() and state_unchanged() and forward_ad._current_level < 0):
          return MISS
      d0 = a0.shape[0]
      if not (2 <= d0):
          return MISS
      out = run([d0, a0, a1])
      return out[0]
graph:
  def forward(self, x_size_0, x, weight):
      mul = torch.ops.aten.mul.Tensor(x, weight)
      mul_1 = torch.ops.aten.mul.Tensor(mul, 3.0)
      return [mul_1]
generated code: none before it is compiled""",
    )


def test_compiled(mode, scale):
    with mode:
        scale(x_of(4), torch.ones(3))
    assert_expected_inline(
        str(mode.explain(scale, x_of(7), torch.ones(3))),
        """\
dispatch_compile::explained_scale(t: f32[7, 3], t: f32[3])
would run compiled; the code is there
implementation: native, since no priority is set
specialization: [s0, 3], [3]
  x: f32, shape [s0, 3], stride [3, 1], device cpu, requires_grad False, is_inference() False
  weight: f32, shape [3], stride [1], device cpu, requires_grad False, is_inference() False
  inference mode off, grad mode on, and the rest of torch's global state
  sizes: 2 <= x.size(0)
guard:
  def call(args, kwargs):
      if len(args) != 2 or len(kwargs) != 0:
          return MISS
      a0, a1, = args
      if not (tensors_match(a0, a1) and not inference_mode() and not a0.is_inference() and not a1.is_inference() and
          state_unchanged() and forward_ad._current_level < 0):
          return MISS
      d0 = a0.shape[0]
      if not (2 <= d0):
          return MISS
      out = run([d0, a0, a1])
      return out[0]
graph:
  def forward(self, x_size_0, x, weight):
      mul = torch.ops.aten.mul.Tensor(x, weight)
      mul_1 = torch.ops.aten.mul.Tensor(mul, 2.0)
      return [mul_1]
generated code: none""",
    )


def test_one_token_after_several(mode, scale):
    with mode:
        scale(x_of(4), torch.ones(3))
    assert_expected_inline(
        str(mode.explain(scale, x_of(1), torch.ones(3))),
        """\
dispatch_compile::explained_scale(t: f32[1, 3], t: f32[3])
would be compiled first, then run compiled
implementation: native, since no priority is set
specialization: [1, 3], [3]; x's shape is [1, 3], was [s0, 3]
  x: f32, shape [1, 3], stride [3, 1], device cpu, requires_grad False, is_inference() False
  weight: f32, shape [3], stride [1], device cpu, requires_grad False, is_inference() False
  inference mode off, grad mode on, and the rest of torch's global state
  sizes: any
guard:
  def call(args, kwargs):
      if len(args) != 2 or len(kwargs) != 0:
          return MISS
      a0, a1, = args
      if not (tensors_match(a0, a1) and not inference_mode() and not a0.is_inference() and not a1.is_inference() and
          state_unchanged() and forward_ad._current_level < 0):
          return MISS
      out = run([a0, a1])
      return out[0]
graph:
  def forward(self, x, weight):
      mul = torch.ops.aten.mul.Tensor(x, weight)
      mul_1 = torch.ops.aten.mul.Tensor(mul, 2.0)
      return [mul_1]
generated code: none before it is compiled""",
    )


def test_another_provider(mode, scale):
    with scale.set_priority(["decode", "lacking", "other"]):
        assert_expected_inline(
            str(mode.explain(scale, x_of(4), torch.ones(3))),
            """\
dispatch_compile::explained_scale(t: f32[4, 3], t: f32[3])
would step aside: provider 'other' is not in providers ('native',)
implementation: other, the first in the priority [decode, other] that supports the arguments
  not decode: its supports_args says no
  not lacking: not supported on this machine""",
        )
        assert_expected_inline(
            str(mode.explain(scale, x_of(1), torch.ones(3))),
            """\
dispatch_compile::explained_scale(t: f32[1, 3], t: f32[3])
would step aside: provider 'decode' is not in providers ('native',)
implementation: decode, the first in the priority [decode, other] that supports the arguments
  not lacking: not supported on this machine""",
        )


def test_no_provider_of_the_priority_supports_the_arguments(mode, scale):
    with scale.set_priority(["decode"]):
        chosen = str(mode.explain(scale, x_of(4), torch.ones(3))).splitlines()[2:5]
    assert_expected_inline(
        "\n".join(chosen),
        """\
implementation: native, since none in the priority [decode] supports the arguments
  not decode: its supports_args says no
  not lacking: not supported on this machine""",
    )


def test_random_numbers(mode, define_ir_op):
    def explained_dropout(x: Tensor) -> Tensor:
        return x * torch.rand_like(x)

    assert_expected_inline(
        str(mode.explain(define_ir_op(explained_dropout, name="explained_dropout"), x_of(4))),
        """\
dispatch_compile::explained_dropout(t: f32[4, 3])
would step aside: the implementation draws random numbers (aten.rand_like.default)
implementation: native, since no priority is set""",
    )


@pytest.fixture
def picky(define_ir_op):
    def explained_picky(x: Tensor) -> Tensor:
        return x if bool(x.sum() > 0) else -x

    return define_ir_op(explained_picky, name="explained_picky")


def test_cannot_be_captured(mode, picky):
    explanation = mode.explain(picky, x_of(4))
    assert explanation.raises
    assert_expected_inline(
        "\n".join(line.partition(": ")[0] for line in str(explanation).splitlines()),
        """\
dispatch_compile::explained_picky(t
would raise CompileError
implementation""",
    )
    assert explanation.reason.startswith(
        "the 'native' implementation of dispatch_compile::explained_picky cannot be captured: "
    )


def test_cannot_be_captured_and_runs_eagerly(picky):
    explanation = dc.DispatchCompileMode(config=EAGER_OR_NATIVE).explain(picky, x_of(4))
    assert not explanation.raises
    assert str(explanation).splitlines()[1].startswith("would run eagerly: the 'native' implementation of ")


def test_op_that_the_mode_leaves_out(scale):
    assert_expected_inline(
        str(dc.DispatchCompileMode(ops=[dc.ops.rms_norm]).explain(scale, x_of(4), torch.ones(3), factor=3)),
        """\
dispatch_compile::explained_scale(t: f32[4, 3], t: f32[3], factor=3)
would step aside: the mode's ops= leaves it out
implementation: native, since no priority is set""",
    )


def test_rms_norm_fits_on_a_screen(mode):
    x, weight = torch.randn(4, 4096, dtype=torch.bfloat16), torch.randn(4096, dtype=torch.bfloat16)
    assert len(str(mode.explain(dc.ops.rms_norm, x, weight, 1e-6)).splitlines()) <= 40


def test_text_is_the_same_every_time(mode, scale):
    texts = {str(mode.explain(scale, torch.randn(4, 3), torch.randn(3))) for _ in range(3)}
    assert len(texts) == 1
    assert "0x" not in texts.pop()


def test_unknown_op(mode):
    with pytest.raises(ValueError, match="explain: no op 'dispatch_compile::nothing'"):
        mode.explain("dispatch_compile::nothing", x_of(4))


def test_op_that_is_no_ir_op(mode):
    with pytest.raises(ValueError, match=r"explain: aten\.sin\.default is no IR op; give it a .*\.register_native"):
        mode.explain(torch.ops.aten.sin.default, x_of(4))


@pytest.mark.parametrize("arguments", [(), (1,), ("x", 2.0), (torch.ones(2), "two"), (torch.ones(2), 2.0, 3)], ids=str)
def test_malformed_calls_raise_as_the_call_does(arguments, mode, counted):
    expected = outcome(counted.op, *arguments)
    actual = outcome(mode.explain, counted.op, *arguments)
    assert (type(actual), str(actual)) == (type(expected), str(expected))


@pytest.mark.parametrize(
    "named",
    [lambda op: op, lambda op: op.torch_op, lambda op: op.torch_op.overloadpacket, lambda op: op.torch_op.name()],
    ids=["IrOp", "OpOverload", "OpOverloadPacket", "name"],
)
def test_ways_to_name_the_op(named, mode, counted):
    assert mode.explain(named(counted.op), x_of(4)).action == "compiled"


@pytest.mark.selective
def test_passes(mode, plain_scale):
    def decision(kind: str) -> str:
        make, kwargs, context = CASES[kind]
        with context():
            return str(mode.explain(plain_scale, *make(), **kwargs)).splitlines()[1]

    assert_expected_inline(
        "\n".join(f"{kind}: {decision(kind)}" for kind in PASSES),
        """\
requires grad: would step aside: x requires grad and grad mode is on
forward-mode AD: would step aside: forward-mode AD is active
autocast: would step aside: autocast is on for cpu
sparse: would step aside: x is sparse_coo
meta: would step aside: x is on the meta device
subclass: would step aside: x is a Tagged""",
    )


# ---- What it says is what happens


class Tagged(Tensor):
    """Overrides nothing, but its results are Tagged too."""


def inference_tensor() -> Tensor:
    with torch.inference_mode():
        return x_of(4)


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def requires_grad() -> Tensor:
    return nn.Parameter(x_of(4))


def dual() -> Tensor:
    return forward_ad.make_dual(x_of(4), x_of(4))


Case = tuple[Callable[[], tuple[Any, ...]], dict[str, Any], Callable[[], AbstractContextManager[Any]]]


def case(x: Callable[[], Any], *args: Any, context: Any = nullcontext, **kwargs: Any) -> Case:
    return lambda: (x(), *args), kwargs, context


CASES = {
    "many tokens": case(lambda: x_of(4)),
    "one token": case(lambda: x_of(1)),
    "no tokens": case(lambda: x_of(0)),
    "an integer for a float": case(lambda: x_of(4), 3),
    "a bool for a float": case(lambda: x_of(4), True),
    "a default, given": case(lambda: x_of(4), 2.0),
    "by keyword": case(lambda: x_of(4), factor=3.0),
    "strided": case(lambda: torch.ones(4, 6)[:, ::2]),
    "inference tensor": case(inference_tensor),
    "inference mode": case(lambda: x_of(4), context=torch.inference_mode),
    "no_grad": case(requires_grad, context=torch.no_grad),
    "requires grad": case(requires_grad),
    "forward-mode AD": case(dual, context=forward_ad.dual_level),
    "autocast": case(lambda: x_of(4), context=autocast),
    "sparse": case(lambda: torch.eye(3).to_sparse()),
    "meta": case(lambda: torch.empty(4, 3, device="meta")),
    "subclass": case(lambda: x_of(4).as_subclass(Tagged)),
    "lazy conjugate": case(lambda: x_of(4, torch.complex64).conj()),
    "lazy negative": case(lambda: x_of(4, torch.complex64).conj().imag),
}

PASSES = ("requires grad", "forward-mode AD", "autocast", "sparse", "meta", "subclass")


def assert_told(mode: dc.DispatchCompileMode, explanation: dc.Explanation) -> None:
    """That the call just made went as explained."""
    event = mode.trace.events[-1]
    told = ("op", "provider", "action", "reason", "specialization", "new", "difference")
    assert [getattr(explanation, name) for name in told] == [getattr(event, name) for name in told]
    assert explanation.inputs == event.arguments


@pytest.mark.parametrize("after_others", [False, True], ids=["first", "after others"])
@pytest.mark.parametrize("kind", CASES)
def test_what_happens_is_what_was_told(kind, after_others, mode, plain_scale):
    make, kwargs, context = CASES[kind]
    if after_others:
        with mode:
            plain_scale(x_of(5, torch.float64), 1.5)
            plain_scale(x_of(1))
    with context():
        for _ in range(2):  # the second time what there is to make has been made
            args = make()
            explanation = mode.explain(plain_scale, *args, **kwargs)
            with mode:
                plain_scale(*args, **kwargs)
            assert_told(mode, explanation)


@pytest.mark.parametrize("config", [EAGER, EAGER_OR_NATIVE], ids=["raise", "native"])
@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_what_fails_is_what_was_told(config, picky):
    mode = dc.DispatchCompileMode(config=config, trace=True)
    for _ in range(2):  # the second time the failure is known
        explanation = mode.explain(picky, x_of(4))
        with mode:
            result = outcome(picky, x_of(4))
        assert_told(mode, explanation)
        assert explanation.raises == isinstance(result, dc.CompileError)


@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_more_specializations_than_there_may_be(counted):
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", max_specializations=1), trace=True)
    for x in (x_of(4), x_of(1), x_of(5)):
        explanation = mode.explain(counted.op, x)
        with mode:
            counted(x)
        assert_told(mode, explanation)
    assert [event.action for event in mode.trace.events] == ["compiled", "eager", "compiled"]


def test_drops_nothing_to_make_room(counted):
    mode = dc.DispatchCompileMode(
        config=dc.CompileConfig(backend="eager", max_specializations=1, eviction="lru"), trace=True
    )
    with mode:
        counted(x_of(4))
    assert mode.explain(counted.op, x_of(1)).new
    assert not mode.explain(counted.op, x_of(4)).new


def test_what_failed_in_the_background(define_ir_op):
    def rolled(x: Tensor) -> Tensor:
        return x.roll(int(x.sum()))

    op, x = define_ir_op(rolled), torch.ones(4, 3)
    config = dc.CompileConfig(backend="eager", on_new="background", on_failure="raise")
    mode = dc.DispatchCompileMode(config=config)
    with mode:
        op(x)
    assert mode.cache.wait(60)
    for _ in range(2):  # explaining does not take the failure from the call that it is for
        foreseen = mode.explain(op, x)
        assert (foreseen.action, foreseen.raises) == ("eager", True)
        assert "cannot be captured" in foreseen.reason
    with mode, pytest.raises(dc.CompileError, match="cannot be captured"):
        op(x)


def test_compiled_in_the_background(counted):
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", on_new="background"), trace=True)
    explanation = mode.explain(counted.op, x_of(4))
    assert mode.cache.wait(timeout=60)
    assert mode.explain(counted.op, x_of(4)) == explanation, "nothing was compiled meanwhile"
    with mode:
        counted(x_of(4))
    assert_told(mode, explanation)
    assert explanation.action == "eager"
    assert mode.cache.wait(timeout=60)
    explanation = mode.explain(counted.op, x_of(4))
    with mode:
        counted(x_of(4))
    assert_told(mode, explanation)
    assert explanation.action == "compiled"


@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_failure_of_the_backend_is_told_once_it_is_known(counted):
    def broken(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise ArithmeticError("broken backend")

    config = dc.CompileConfig(backend=broken, on_failure="native")
    mode = dc.DispatchCompileMode(config=config, trace=True)
    assert mode.explain(counted.op, x_of(4)).action == "compiled"
    for _ in range(2):
        with mode:
            counted(x_of(4))
        explanation = mode.explain(counted.op, x_of(4))
        assert_told(mode, explanation)
        assert explanation.reason.endswith("ArithmeticError: broken backend")


def test_implementations_that_are_not_compiled(mode, define_ir_op):
    def overwriting(x: Tensor) -> Tensor:
        return x.add_(1) * 2

    def reshaping(x: Tensor) -> Tensor:
        return x.view(-1)

    for op in map(define_ir_op, (overwriting, reshaping)):
        for _ in range(2):
            explanation = mode.explain(op, x_of(4))
            with mode:
                op(x_of(4))
            assert_told(mode, explanation)
            assert explanation.action == "aside"


def test_sizes_that_the_implementation_tells_apart(mode, define_ir_op):
    def branching(x: Tensor) -> Tensor:
        return x * 2 if x.size(0) > 100 else x * 3

    op = define_ir_op(branching)
    for tokens in (4, 7, 200, 2):
        explanation = mode.explain(op, x_of(tokens))
        with mode:
            op(x_of(tokens))
        assert_told(mode, explanation)
    assert mode.cache.stats().compiles == 2
    assert mode.explain(op, x_of(4)).size_guard == "2 <= x.size(0) and x.size(0) <= 100"
    assert "mul = torch.ops.aten.mul.Tensor(x, 3)" in mode.explain(op, x_of(4)).graph


def test_during_the_capture_of_a_cuda_graph(mode, counted, monkeypatch):
    monkeypatch.setattr("dispatch_compile._call.decision.captures_cuda_graph", lambda arguments: True)
    explanation = mode.explain(counted.op, x_of(4))
    with mode:
        counted(x_of(4))
    assert_told(mode, explanation)
    assert explanation.reason == "not compiled yet, and a CUDA graph is being captured"


def test_inside_a_transform(mode, counted):
    def told(x: Tensor) -> Tensor:
        explanation = mode.explain(counted.op, x)
        with mode:
            counted(x)
        assert_told(mode, explanation)
        return x.sum()

    torch.func.grad(told)(x_of(4))
    assert len(mode.trace.events) == 1


@pytest.fixture
def define_custom_op() -> Iterator[Callable[..., Any]]:
    """``define_custom_op(fn, reference, mutates_args)``: an op of another library with a reference implementation."""
    handles: list[Any] = []

    def define(fn: Callable[..., Any], reference: Callable[..., Any], mutates_args: tuple[str, ...] = ()) -> Any:
        name = f"dispatch_compile_test::{fn.__name__}"
        op = torch.library.custom_op(name, mutates_args=mutates_args)(fn)
        handles.append(dc.register_native(name, reference))
        return op

    yield define
    for handle in handles:
        handle.remove()


def halved(x: Tensor) -> Tensor:
    return x / 2


def test_op_of_another_library(mode, define_custom_op):
    """With a formula for autograd, the op is called with grad mode off."""

    def explained_half(x: Tensor) -> Tensor:
        return x / 2

    op = define_custom_op(explained_half, halved)
    op.register_autograd(lambda ctx, grad: grad / 2)
    explanation = mode.explain("dispatch_compile_test::explained_half", requires_grad())
    with mode:
        op(requires_grad())
    assert_told(mode, explanation)
    assert (explanation.action, explanation.state["grad mode"]) == ("compiled", "off")
    assert explanation.priority == ()


@pytest.mark.filterwarnings("ignore:register_native. torch decomposes")
def test_op_that_torch_decomposes(mode):
    def normalized(x: Tensor, normalized_shape: list[int], weight: Tensor | None = None) -> Tensor:
        return x

    def reference(
        input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        return normalized(input, normalized_shape, weight) * 1.5

    op, x = torch.ops.aten.rms_norm.default, x_of(4)
    handle = dc.register_native(op, reference, activations=["input"])
    try:
        seen = Seen()
        with mode, seen:
            explanation = mode.explain(op, x, [3])
            assert seen.ops == []
            op(x, [3])
        assert mode.trace.events == []
        assert explanation.reason == "it decomposes before it gets to where calls are caught"
        with torch.inference_mode():
            explanation = mode.explain(op, x, [3])
            with mode:
                op(x, [3])
        assert_told(mode, explanation)
        assert explanation.action == "compiled"
    finally:
        handle.remove()


def test_op_with_a_kernel_that_lets_no_call_through(mode, counted):
    library = torch.library.Library("dispatch_compile", "IMPL")
    try:
        library.impl(counted.op.name, lambda x, factor=2.0: x.clone(), "AutogradCPU")
        explanation = mode.explain(counted.op, x_of(4))
    finally:
        library._destroy()
    assert (explanation.action, explanation.provider) == ("aside", "native")
    assert explanation.reason == "a kernel of its own deals with it before it gets to where calls are caught"


@pytest.mark.vllm
def test_op_of_vllm_ir(mode, monkeypatch):
    op = pytest.importorskip("vllm.ir").ops.rms_norm

    def some(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        return x * 2

    monkeypatch.setattr(op, "impls", dict(op.impls))
    op.register_impl("some", supports_args=lambda x, weight, epsilon, variance_size=None: x.size(0) > 4)(some)
    with op.set_priority(["some", "native"]):
        for tokens, skipped in ((8, None), (4, "its supports_args says no")):
            x = torch.ones(tokens, 16)
            explanation = mode.explain(op, x, None, 1e-6)
            with mode:
                op(x, None, 1e-6)
            assert_told(mode, explanation)
            assert explanation.priority == ("some", "native")
            assert explanation.skipped.get("some") == skipped


def test_op_with_a_kernel_that_falls_back(mode, counted):
    def falling_back(keyset: Any, x: Tensor) -> Tensor:
        try:
            return counted.op.torch_op.redispatch(keyset & torch._C._after_autograd_keyset, x)
        except Exception:
            return fallback(x)

    def fallback(x: Tensor) -> Tensor:
        raise AssertionError("the call did not fail")

    library = torch.library.Library("dispatch_compile", "IMPL")
    try:
        library.impl(counted.op.name, falling_back, "AutogradCPU", with_keyset=True)
        explanation = mode.explain(counted.op, x_of(4))
    finally:
        library._destroy()
    assert explanation.action == "compiled"


# ---- Guards, graph, code


def test_guard_is_the_one_in_front_of_the_code(mode, scale):
    foreseen = mode.explain(scale, x_of(4), torch.ones(3)).guard
    with mode:
        scale(x_of(4), torch.ones(3))
    [entry] = guarded_entries(mode, scale)
    assert entry.call.__doc__ == mode.explain(scale, x_of(7), torch.ones(3)).guard == foreseen
    assert "tensors_match(a0, a1)" in foreseen


def test_graph_has_the_parameters_names(mode, define_ir_op):
    def joined(xs: list[Tensor], mul: Tensor, input: Tensor) -> Tensor:
        return torch.cat(xs) * mul + input

    op = define_ir_op(joined, activations=["xs"])
    assert_expected_inline(
        mode.explain(op, [x_of(4), x_of(5)], torch.ones(3), torch.ones(3)).graph,
        """\
def forward(self, xs_0_size_0, xs_1_size_0, xs_0, xs_1, mul, input):
    input_1 = input
    cat = torch.ops.aten.cat.default([xs_0, xs_1])
    mul_1 = torch.ops.aten.mul.Tensor(cat, mul)
    add = torch.ops.aten.add.Tensor(mul_1, input_1)
    return [add]""",
    )


def test_generated_code():
    mode = dc.DispatchCompileMode()

    def explained() -> dc.Explanation:
        return mode.explain(dc.ops.silu_and_mul, torch.ones(4, 16))

    before = explained()
    assert (before.generated_code, before.generated_code_path) == (None, None)
    assert before.text(code=True) == before.text()
    with mode:
        dc.ops.silu_and_mul(torch.ones(4, 16))
    after = explained()
    assert Path(after.generated_code_path).read_text() == after.generated_code
    assert str(after).splitlines()[-1] == f"generated code: {after.generated_code_path}"
    assert after.text(code=True) == f"{after}\n{after.generated_code}"
    assert "def call(" in after.generated_code


# ---- Nothing else comes of it


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class Counting:
    """A backend that counts how often it compiles, and how often its code runs."""

    def __init__(self) -> None:
        self.compiles = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.compiles += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


def test_no_kernel_runs_and_nothing_is_compiled(define_ir_op, define_opaque):
    kernel_runs: list[int] = []

    def kernel(x: Tensor) -> Tensor:
        kernel_runs.append(x.size(0))
        return x * 2

    inner, backend = define_opaque(kernel, fake=torch.empty_like), Counting()

    def native(x: Tensor) -> Tensor:
        return inner(x) + 1

    op = define_ir_op(native)
    op.register_impl("other")(native)
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend=backend))

    def explain() -> list[str]:
        made = [mode.explain(op, x) for x in (x_of(4), x_of(1), requires_grad())]
        with op.set_priority(["other"]):
            made.append(mode.explain(op, x_of(4)))
        return [explanation.action for explanation in made]

    assert explain() == ["compiled", "compiled", "aside", "aside"]
    assert (kernel_runs, backend.compiles, backend.runs) == ([], 0, 0)
    with mode:
        op(x_of(4))
    ran = kernel_runs.copy(), backend.compiles, backend.runs
    assert ran[0]
    assert explain() == ["compiled", "compiled", "aside", "aside"]
    assert (kernel_runs, backend.compiles, backend.runs) == ran


class Wrapper(Tensor):
    """A tensor around a tensor, which counts the calls that it takes part in."""

    calls = 0

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.calls += 1
        return args[0]


def test_subclass_does_not_see_it(mode, scale, define_ir_op):
    def total(xs: list[Tensor]) -> Tensor:
        return torch.stack(xs).sum(0)

    op, wrapper = define_ir_op(total), Wrapper(x_of(4))
    reasons = [mode.explain(scale, x_of(4), weight=wrapper).reason, mode.explain(op, [x_of(4), wrapper]).reason]
    assert reasons == ["weight is a Wrapper", "xs[1] is a Wrapper"]
    assert Wrapper.calls == 0
    scale(wrapper, torch.ones(3))
    assert Wrapper.calls == 1


def everything(mode: dc.DispatchCompileMode, op: dc.IrOp) -> tuple[Any, ...]:
    """What explaining could have changed."""
    cached = {
        impl: {config: (table.calls, table.guarded, dict(table._by_key)) for config, table in entry.tables.items()}
        for impl, entry in mode.cache._entries.items()
    }
    return mode.cache.stats(), dc.counters(), cached, mode.trace.calls, [impl.provider for impl in op.impls.values()]


@pytest.mark.parametrize("entered", [False, True], ids=["outside", "inside"])
@pytest.mark.filterwarnings("ignore::dispatch_compile.DispatchCompileWarning")
def test_nothing_is_counted_cached_or_traced(entered, mode, scale, picky):
    def explain_all() -> None:
        for x in (x_of(4), x_of(1), requires_grad(), x_of(4).as_subclass(Tagged)):
            mode.explain(scale, x, torch.ones(3))
            outer.explain(scale, x, torch.ones(3))
        mode.explain(picky, x_of(4))
        with scale.set_priority(["other"]):
            mode.explain(scale, x_of(4), torch.ones(3))

    outer = dc.DispatchCompileMode(ops=[dc.ops.rms_norm], trace=True)
    for calls in range(2):
        before = everything(mode, scale), everything(outer, scale)
        with outer, mode if entered else nullcontext():
            explain_all()
        assert (everything(mode, scale), everything(outer, scale)) == before
        assert len(mode.cache) == 2 * calls
        with mode:
            scale(x_of(4), torch.ones(3))
            outcome(picky, x_of(4))
    assert (mode.cache.stats().compiles, len(mode.trace.events)) == (1, 4)


def test_other_modes_do_not_see_it_and_are_there_afterwards(mode, counted):
    seen = Seen()
    with seen, mode:
        x = x_of(4)
        seen.ops.clear()
        explanation = mode.explain(counted.op, x)
        assert seen.ops == []
        counted(x)
    assert seen.ops == [str(counted.op.torch_op)]
    assert_told(mode, explanation)


def test_arguments_are_as_before(mode, define_custom_op):
    def explained_increment(x: Tensor) -> None:
        x.add_(1)

    define_custom_op(explained_increment, explained_increment, mutates_args=("x",))
    x = x_of(4)
    explanation = mode.explain("dispatch_compile_test::explained_increment", x)
    assert explanation.action == "compiled"
    assert x.tolist() == x_of(4).tolist()
    assert x._version == 0


def test_keeps_no_argument_and_no_implementation(mode):
    def explained_briefly(x: Tensor) -> Tensor:
        return x * 2

    op, x = dc.register_op(explained_briefly), x_of(4)
    explanation = mode.explain(op, x)
    assert explanation.action == "compiled"
    alive = weakref.ref(x), weakref.ref(op.impls["native"])
    op.unregister()
    del op, x, explained_briefly
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_the_threads_modes_are_there_after_an_error(mode, define_ir_op):
    def unsupported(x: Tensor) -> bool:
        raise ArithmeticError("supports_args")

    def double(x: Tensor) -> Tensor:
        return x * 2

    op = define_ir_op(double)
    op.register_impl("other", supports_args=unsupported)(double)
    with mode:
        with op.set_priority(["other", "native"]), pytest.raises(ArithmeticError):
            mode.explain(op, x_of(4))
        op(x_of(4))
    assert mode.cache.stats().hits == 1
