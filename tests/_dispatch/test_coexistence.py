"""What torch can be doing around a call of an IR op: everything that a caller can see is as without the mode.

Each surrounding is a row of a table: how it runs a call, and what the mode is to do there. Every overload that ships
is called in each, bare and from opaque ops; in a mode around the surrounding and in one entered inside it; by the short
cut for calls seen before and by the traced way.
"""

from __future__ import annotations

import copy
import random as python_random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from shipped import BARE, IN_CUSTOM_OP, IN_LIBRARY_OP, PLACES, SHIPPED, OpaqueOps, random, tensors_in, with_tensors
from support import EAGER, assert_same, outcome
from torch import Tensor, nn
from torch._C._dynamo.guards import GlobalStateGuard
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import dispatch_compile as dc

Call = Callable[..., Any]

pytestmark = [
    pytest.mark.long,
    pytest.mark.selective,
    pytest.mark.filterwarnings(  # what torch warns of without a mode too
        "ignore:.*an autograd kernel was not registered",
        "ignore:.*torch.jit.script.* is deprecated",
        "ignore:Anomaly Detection",
        "ignore:Error detected in",
        "ignore:Full backward hook is firing",
        "ignore:There is a performance drop",
    ),
]


@pytest.fixture(scope="module")
def opaque_ops() -> Iterator[OpaqueOps]:
    ops = OpaqueOps()
    yield ops
    ops.destroy()


@pytest.fixture(scope="module")
def cache() -> dc.NativeCache:
    """One for all tests here: compiling in each would take most of their time."""
    return dc.NativeCache()


# ---- The table


COMPILED = "compiled"
NOTHING_ARRIVES = "no call arrives"
REQUIRES_GRAD = "requires grad and grad mode is on"
FORWARD_MODE = "forward-mode AD is active"
AUTOCAST = "autocast is on for cpu"
META = "is on the meta device"


@dataclass(frozen=True)
class Surrounding:
    """How a call is run, and what the mode does with it: :data:`COMPILED`, or how its reason to pass ends."""

    run: Callable[[Call, tuple[Any, ...]], Any]
    does: str = COMPILED
    in_custom_op: str | None = None  # where it does something else with calls from the body of a custom_op
    ops: Sequence[str] = tuple(SHIPPED)

    def does_in(self, place: str) -> str:
        return self.in_custom_op if place == IN_CUSTOM_OP and self.in_custom_op else self.does


def within(*contexts: Callable[[], AbstractContextManager[Any]]) -> Callable[[Call, tuple[Any, ...]], Any]:
    """Run a call in contexts, outermost first."""

    def run(call: Call, args: tuple[Any, ...]) -> Any:
        if not contexts:
            return call(*args)
        with contexts[0]():
            return within(*contexts[1:])(call, args)

    return run


def leaves(args: tuple[Any, ...]) -> list[Any]:
    """Arguments that require grad."""
    return with_tensors(args, [tensor.detach().clone().requires_grad_() for tensor in tensors_in(args)])


def loss_of(results: Any) -> Tensor:
    return torch.stack([result.double().square().sum() for result in tensors_in(results)]).sum()


def differentiated(call: Call, args: Any, **options: Any) -> list[Any]:
    """Results, whether they have a grad_fn, and gradients, or the errors instead."""
    results = outcome(call, *args)
    if isinstance(results, Exception):
        return [results]
    wanted = [tensor for tensor in tensors_in(args) if tensor.requires_grad]
    has_grad_fn = [result.grad_fn is not None for result in tensors_in(results)]
    gradients = outcome(torch.autograd.grad, loss_of(results), wanted, allow_unused=True, **options)
    return [results, has_grad_fn, gradients]


def gradients(call: Call, args: tuple[Any, ...]) -> Any:
    return differentiated(call, leaves(args))


def gradients_of_gradients(call: Call, args: tuple[Any, ...]) -> Any:
    args = leaves(args)
    *seen, first = differentiated(call, args, create_graph=True)
    if isinstance(first, Exception):
        return [*seen, first]
    inputs, first = tensors_in(args), [gradient for gradient in first if gradient is not None]
    return [*seen, first, outcome(lambda: torch.autograd.grad(loss_of(first), inputs, allow_unused=True))]


def only_the_last_tensor_requires_grad(call: Call, args: tuple[Any, ...]) -> Any:
    *others, last = tensors_in(args)
    return differentiated(call, with_tensors(args, [*others, last.detach().clone().requires_grad_()]))


def no_grad_inside_a_graph(call: Call, args: tuple[Any, ...]) -> Any:
    """The result of a call under no_grad as a constant of a graph."""
    x = args[0].clone().requires_grad_()

    def constant(x: Tensor) -> Tensor:
        with torch.no_grad():
            results = call(x.sin(), *args[1:])
        return x * loss_of(results)

    return differentiated(constant, [x])


def inference_tensors_outside(call: Call, args: tuple[Any, ...]) -> Any:
    with torch.inference_mode():
        args = with_tensors(args, [tensor.clone() for tensor in tensors_in(args)])
    return call(*args)


def saved_tensors(call: Call, args: tuple[Any, ...]) -> Any:
    """What autograd saves for backward, in order, with the gradients."""
    seen: list[Tensor] = []

    def kept(tensor: Tensor) -> Tensor:
        seen.append(tensor.detach().clone())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(kept, kept):
        return [gradients(call, args), seen]


def checkpointed(call: Call, args: tuple[Any, ...]) -> Any:
    return differentiated(lambda *args: checkpoint(call, *args, use_reentrant=False), leaves(args))


def dual_numbers(call: Call, args: tuple[Any, ...]) -> Any:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(tensor, torch.ones_like(tensor)) for tensor in tensors_in(args)]
        return [tuple(forward_ad.unpack_dual(result)) for result in tensors_in(call(*with_tensors(args, duals)))]


def transformed(transform: Callable[..., Any]) -> Callable[[Call, tuple[Any, ...]], Any]:
    """``transform(fn, tensors)`` on a call as a function of its tensors."""

    def run(call: Call, args: tuple[Any, ...]) -> Any:
        return transform(lambda *tensors: call(*with_tensors(args, tensors)), tensors_in(args))

    return run


def batches(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.stack([tensor, tensor * 2, tensor * 3]) for tensor in tensors]


def scalar(fn: Call) -> Call:
    """``fn`` as a loss. An IR op's own derivative under torch.func is zero; the factor in front has another."""
    return lambda x, *others: (x.double().sum() * loss_of(fn(x, *others))).sum()


def metadata(results: Any) -> list[Any]:
    return [(type(r), r.shape, r.stride(), r.dtype, r.device) for r in tensors_in(results)]


def fake_tensors(call: Call, args: tuple[Any, ...]) -> Any:
    with FakeTensorMode() as fake_mode:
        fakes = [fake_mode.from_tensor(tensor) for tensor in tensors_in(args)]
        return metadata(call(*with_tensors(args, fakes)))


def meta_tensors(call: Call, args: tuple[Any, ...]) -> Any:
    return metadata(call(*with_tensors(args, [tensor.to("meta") for tensor in tensors_in(args)])))


def pulled_back(fn: Call, tensors: list[Tensor]) -> Any:
    loss, pull_back = torch.func.vjp(scalar(fn), *tensors)
    return loss, pull_back(torch.ones_like(loss))


@contextmanager
def autocast_for_another_device() -> Iterator[None]:
    """What ``torch.autocast("cuda")`` sets; on a machine without CUDA it would only warn."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


# For states of the thread that no op looks at more than another: each takes a capture for every op.
FEW_OPS = ["rms_norm", "quant_fp8_per_token"]

SURROUNDINGS = {
    "nothing": Surrounding(within()),
    "no_grad": Surrounding(lambda call, args: within(torch.no_grad)(call, tuple(leaves(args)))),
    "inference_mode": Surrounding(within(torch.inference_mode)),
    "inference tensors outside of inference_mode": Surrounding(inference_tensors_outside, ops=FEW_OPS),
    "enable_grad in inference_mode": Surrounding(within(torch.inference_mode, torch.enable_grad), ops=FEW_OPS),
    "copied results": Surrounding(lambda call, args: copy.deepcopy(call(*args))),
    # A custom_op runs its body with grad mode off.
    "gradients": Surrounding(gradients, REQUIRES_GRAD, in_custom_op=COMPILED),
    "gradients of gradients": Surrounding(gradients_of_gradients, REQUIRES_GRAD, in_custom_op=COMPILED),
    "gradients of the last tensor": Surrounding(only_the_last_tensor_requires_grad, REQUIRES_GRAD, COMPILED),
    "no_grad inside a graph": Surrounding(no_grad_inside_a_graph),
    "saved tensors": Surrounding(saved_tensors, REQUIRES_GRAD, in_custom_op=COMPILED),
    "detect_anomaly": Surrounding(
        lambda call, args: within(lambda: torch.autograd.detect_anomaly(check_nan=False))(gradients, (call, args)),
        REQUIRES_GRAD,
        in_custom_op=COMPILED,
    ),
    "checkpoint": Surrounding(checkpointed, REQUIRES_GRAD, in_custom_op=COMPILED),
    "dual numbers": Surrounding(dual_numbers, FORWARD_MODE),
    "autocast": Surrounding(within(autocast), AUTOCAST),
    "no autocast in autocast": Surrounding(within(autocast, lambda: torch.autocast("cpu", enabled=False))),
    "autocast for another device": Surrounding(within(autocast_for_another_device), ops=FEW_OPS),
    "another default device": Surrounding(within(lambda: torch.device("meta"))),
    "deterministic algorithms": Surrounding(within(deterministic), ops=FEW_OPS),
    "vmap": Surrounding(transformed(lambda fn, tensors: torch.func.vmap(fn)(*batches(tensors)))),
    "func.grad": Surrounding(transformed(lambda fn, tensors: torch.func.grad(scalar(fn))(*tensors))),
    "func.vjp": Surrounding(transformed(pulled_back)),
    "func.jvp": Surrounding(
        transformed(lambda fn, tensors: torch.func.jvp(fn, tuple(tensors), tuple(map(torch.ones_like, tensors)))),
        FORWARD_MODE,
    ),
    "func.functionalize": Surrounding(transformed(lambda fn, tensors: torch.func.functionalize(fn)(*tensors))),
    "vmap of func.grad": Surrounding(
        transformed(lambda fn, tensors: torch.func.vmap(torch.func.grad(scalar(fn)))(*batches(tensors)))
    ),
    "fake tensors": Surrounding(fake_tensors, NOTHING_ARRIVES),
    "meta tensors": Surrounding(meta_tensors, META),
}


# ---- What is compared


def entering(mode: dc.DispatchCompileMode, call: Call) -> Call:
    """``call`` inside the mode."""

    def inside(*args: Any) -> Any:
        with mode:
            return call(*args)

    return inside


# Whether the mode traces, and whether it is entered inside the surrounding.
WAYS = [(True, False), (False, False), (False, True)]


def assert_as_without_the_mode(
    surrounding: Surrounding, call: Call, args: tuple[Any, ...], does: str, caches: Sequence[dc.NativeCache]
) -> None:
    """In each of :data:`WAYS`, with its cache, what is seen of the call, and how many calls are compiled or passed."""
    expected, counts = outcome(surrounding.run, call, args), set()
    for (trace, inside), cache in zip(WAYS, caches, strict=True):
        mode, before = dc.DispatchCompileMode(config=EAGER, cache=cache, trace=trace), cache.stats()
        if inside:
            actual = outcome(surrounding.run, entering(mode, call), args)
        else:
            with mode:
                actual = outcome(surrounding.run, call, args)
        assert_same(actual, expected)
        after = cache.stats()
        counts.add((after.hits - before.hits, after.asides - before.asides))
        if mode.trace is not None:
            whys = [event.reason or event.action for event in mode.trace.events]
            assert all(why.endswith(does) for why in whys), whys
            # Where torch itself refuses, before the call arrives, it does without the mode too.
            assert bool(whys) == (does != NOTHING_ARRIVES and not isinstance(expected, Exception))
            assert counts == {(len(whys), 0) if does == COMPILED else (0, len(whys))}
    assert len(counts) == 1, "the short cut and the traced way differ"


CALLS_IN = [(BARE, torch.float32), (IN_LIBRARY_OP, torch.bfloat16), (IN_CUSTOM_OP, torch.bfloat16)]


@pytest.mark.parametrize(
    ("surrounded_by", "name"), [(by, name) for by, surrounding in SURROUNDINGS.items() for name in surrounding.ops]
)
def test_a_call_is_as_without_the_mode(surrounded_by, name, opaque_ops, cache):
    surrounding = SURROUNDINGS[surrounded_by]
    for place, dtype in CALLS_IN:
        call, args = opaque_ops.call(name, place), SHIPPED[name].make_args(dtype)
        with dc.DispatchCompileMode(config=EAGER, cache=cache):
            call(*args)  # what is compiled for this must not serve where it is wrong
        assert_as_without_the_mode(surrounding, call, args, surrounding.does_in(place), [cache] * len(WAYS))


@pytest.mark.parametrize("surrounded_by", list(SURROUNDINGS))
def test_the_first_call_of_a_mode_is_too(surrounded_by, opaque_ops):
    """It is captured in the middle of whatever surrounds it."""
    surrounding, args = SURROUNDINGS[surrounded_by], SHIPPED["silu_and_mul"].make_args(torch.float32)
    call = opaque_ops.call("silu_and_mul", IN_LIBRARY_OP)
    assert_as_without_the_mode(surrounding, call, args, surrounding.does, [dc.NativeCache() for _ in WAYS])


@pytest.mark.parametrize("name", ["rms_norm", "silu_and_mul"])
def test_a_checkpoint_that_runs_its_forward_without_grad(name):
    """And once more, with grad, in backward."""

    def run() -> Any:
        args = leaves(SHIPPED[name].make_args(torch.float32))
        result = checkpoint(op, *args, use_reentrant=True)
        result.square().sum().backward()  # this checkpoint does not work with torch.autograd.grad
        return [result, [tensor.grad for tensor in tensors_in(args)]]

    op = SHIPPED[name].op.torch_op
    expected, mode = run(), dc.DispatchCompileMode(config=EAGER, trace=True)
    with mode:
        assert_same(run(), expected)
    assert [event.reason or event.action for event in mode.trace.events] == [COMPILED, f"x {REQUIRES_GRAD}"]


def test_every_overload_that_ships_is_in_the_table():
    overloads = {
        overload.name() for name in dc.ops.__all__ for overload in dc._ir.protocol.overloads(getattr(dc.ops, name))
    }
    assert {shipped.op.torch_op.name() for shipped in SHIPPED.values()} == overloads


# ---- What compiling leaves behind


def state_of_the_process() -> dict[str, Any]:
    return {
        "random numbers of torch": torch.get_rng_state().tolist(),
        "random numbers of Python": python_random.getstate(),
        "random numbers of numpy": numpy.random.get_state()[1].tolist(),
        "what torch.compile guards on": GlobalStateGuard().__getstate__(),
        "inference mode": torch.is_inference_mode_enabled(),
        "dispatch keys switched on": str(torch._C._dispatch_tls_local_include_set()),
        "dispatch keys switched off": str(torch._C._dispatch_tls_local_exclude_set()),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "interop threads": torch.get_num_interop_threads(),
    }


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_a_first_call_leaves_the_state_of_the_process(context, backend):
    mode, x = dc.DispatchCompileMode(config=dc.CompileConfig(backend=backend)), random(torch.float32, 4, 48)
    with context():
        before = state_of_the_process()
        with mode:
            assert state_of_the_process() == before
            dc.ops.silu_and_mul(x)
            assert state_of_the_process() == before
        assert state_of_the_process() == before
    assert mode.cache.stats().compiles == 1


# ---- Errors


WRONG_CALLS = {
    "no such shape": ("rms_norm", lambda x: (x, torch.ones(7), 1e-6)),
    "missing argument": ("rms_norm", lambda x: (x,)),
    "wrong type": ("rms_norm", lambda x: (x, None, "small")),
    "no tensor": ("silu_and_mul", lambda x: (None,)),
    "odd width": ("silu_and_mul", lambda x: (x[:, :5],)),
    "no dimensions": ("silu_and_mul", lambda x: (x[0, 0],)),
    "unknown option": ("gelu_and_mul", lambda x: (x, "erf")),
    "width of no group": ("quant_fp8_per_group", lambda x: (x,)),
    "parts of two lengths": ("concat_quant_fp8", lambda x: (x, x[:2], torch.ones(1))),
    "as many scales as fit nothing": ("quant_fp8_static", lambda x: (x, torch.ones(3))),
    "no dimension to scale": ("quant_fp8_per_token", lambda x: (x[:, :0],)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrong", list(WRONG_CALLS))
def test_an_error_is_the_error_without_the_mode(wrong, place, opaque_ops):
    name, make_args = WRONG_CALLS[wrong]
    call, mode = opaque_ops.call(name, place), dc.DispatchCompileMode(config=EAGER)
    args = make_args(torch.randn(4, 16))
    expected = outcome(call, *args)
    assert isinstance(expected, Exception)
    for _ in range(2):
        with mode:
            assert_same(outcome(call, *args), expected)
    assert mode.cache.stats().hits == 0


# ---- Modules


class Layer(nn.Module):
    """Two IR ops, each with a parameter before or behind it."""

    def __init__(self, norm: Call, activation: Call) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16))
        self.linear = nn.Linear(16, 32)
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(self.norm(x, self.weight, 1e-6)))


@pytest.fixture(params=[BARE, IN_LIBRARY_OP])
def layer(request, opaque_ops) -> Layer:
    torch.manual_seed(5)
    return Layer(*(opaque_ops.call(name, request.param) for name in ("rms_norm", "silu_and_mul")))


def trained(layer: Layer) -> list[Any]:
    """Losses and parameters of a copy of the layer after some steps, and what its hooks saw."""
    layer, seen = copy.deepcopy(layer), []
    layer.register_forward_hook(lambda module, args, result: seen.append(result.detach().clone()))
    layer.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].clone()))
    layer.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(3):
        loss = layer(random(torch.float32, 4 + step, 16)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [losses, [parameter.detach() for parameter in layer.parameters()], seen]


def test_training_a_module(layer):
    expected, mode = trained(layer), dc.DispatchCompileMode(config=EAGER)
    with mode:
        assert_same(trained(layer), expected)
    assert (mode.cache.stats().hits, mode.cache.stats().asides) == (0, 6)


def test_evaluating_a_module_and_its_copies(layer):
    x, mode = random(torch.float32, 4, 16), dc.DispatchCompileMode(config=EAGER)
    with torch.no_grad():
        expected = layer(x)
        with mode:
            for module in (layer, copy.deepcopy(layer), copy.deepcopy(layer).requires_grad_(False)):
                assert_same(module(x), expected)
            parameters = {name: parameter * 2 for name, parameter in layer.named_parameters()}
            doubled = torch.func.functional_call(layer, parameters, (x,))
        assert_same(doubled, torch.func.functional_call(layer, parameters, (x,)))
    # Parameters that require grad are told from those that do not, as an implementation may do.
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (3, 8)


def test_a_module_that_keeps_an_ir_op_can_be_copied():
    layer, x = Layer(dc.ops.rms_norm, dc.ops.silu_and_mul), random(torch.float32, 4, 16)
    with torch.no_grad():
        assert_same(copy.deepcopy(layer)(x), layer(x))
