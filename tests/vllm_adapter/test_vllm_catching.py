"""Which ``CustomOp`` layers are caught, when, as what, for how long, and what becomes of all others."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from support import EAGER, outcome
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from vllm_support import CustomOp, GroupShape, QuantFP8, SiluAndMul, made, registered, silu_and_mul, vllm_config

import dispatch_compile as dc
from dispatch_compile.vllm import _forward_op, _settings

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def nothing_said_before():
    _settings.say_once.cache_clear()


@pytest.fixture
def catching():
    handle = dc.vllm.catch_custom_ops()
    yield handle
    handle.remove()


@pytest.fixture
def vllm_ran(monkeypatch):
    """The functions that vLLM's own wrappers ran: torch.compile, as vLLM's layers call it, only writes them down."""
    ran = []

    def torch_compile(fn, **options):
        @functools.wraps(fn)
        def compiled(*args, **kwargs):
            ran.append(fn)
            return fn(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", torch_compile)
    return ran


@pytest.fixture
def mode():
    return dc.DispatchCompileMode(config=EAGER, trace=True)


@registered("test_scaled")
class Scaled(CustomOp):
    """A layer with a value that its results show."""

    def __init__(self, factor, **attributes):
        super().__init__(compile_native=True)
        self.factor = factor
        vars(self).update(attributes)

    def forward_native(self, x: Tensor) -> Tensor:
        return x * self.factor


X = torch.arange(6).reshape(3, 2)


def op_of(layer):
    """The op that a layer was last called as."""
    return layer._forward_method.__self__._op


def test_is_caught_inside_a_mode_only(catching, vllm_ran, mode):
    layer = made(lambda: Scaled(2))
    assert layer(X).tolist() == (X * 2).tolist()
    assert (len(vllm_ran), op_of(layer)) == (1, None)
    with mode:
        assert layer(X).tolist() == (X * 2).tolist()
    assert (len(vllm_ran), mode.cache.stats().hits) == (1, 1)
    assert layer(X).tolist() == (X * 2).tolist()
    assert (len(vllm_ran), mode.cache.stats().hits) == (2, 1)
    [event] = mode.trace.events
    assert event.op.startswith("vllm_custom_op::test_scaled")
    assert (event.action, event.specialization) == ("compiled", "[s0, 2]")


@pytest.fixture
def frozen():
    """As vLLM leaves the garbage collector once an engine has started."""
    yield gc.freeze
    gc.unfreeze()


@pytest.mark.parametrize("is_frozen", [False, True])
def test_layers_that_exist_already_are_caught(vllm_ran, mode, frozen, is_frozen):
    layer = made(lambda: Scaled(2))
    if is_frozen:
        frozen()
    handle = dc.vllm.catch_custom_ops()
    assert bool(gc.get_freeze_count()) == is_frozen
    with mode:
        layer(X)
    assert (len(vllm_ran), mode.cache.stats().hits) == (0, 1)
    handle.remove()


def test_removing_the_handle_leaves_everything_as_vllm_made_it(mode):
    vllms_own = vars(CustomOp)["dispatch_forward"]
    before = made(lambda: Scaled(2))
    method = before._forward_method
    first, second = dc.vllm.catch_custom_ops(), dc.vllm.catch_custom_ops()
    after = made(lambda: Scaled(2))
    first.remove()
    first.remove()
    with mode:
        before(X), after(X)
    assert mode.cache.stats().hits == 2, "one of two handles is left"
    second.remove()
    assert vars(CustomOp)["dispatch_forward"] is vllms_own
    assert before._forward_method is method
    assert after._forward_method.__wrapped__ == after.forward_native


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (lambda: SiluAndMul(compile_native=False), {}),
        (silu_and_mul, {"mode": "NONE"}),
        (silu_and_mul, {"custom_ops": "all"}),
        (silu_and_mul, {"backend": "eager"}),
    ],
    ids=["compile_native=False", "compilation off", "enabled", "eager backend"],
)
def test_what_vllm_does_not_compile_is_left_alone(catching, mode, make, config):
    layer = made(make, vllm_config(**config))
    with mode:
        layer(torch.randn(4, 8))
    assert len(mode.trace.events) == 0


# ---- Configurations.


def test_results_are_those_of_the_instance_that_is_called(catching, mode):
    factors = [2, 2.0, True, -0.0, 0.0, 3, 2]
    layers = [made(lambda factor=factor: Scaled(factor)) for factor in factors]
    x = torch.ones(3, dtype=torch.int64)
    with mode:
        for layer, factor in zip(layers, factors, strict=True):
            result, expected = layer(x), x * factor
            assert (result.dtype, result.tolist()) == (expected.dtype, expected.tolist())
            assert torch.equal(result.signbit(), expected.signbit()), factor
    assert len({event.op for event in mode.trace.events}) == 6
    assert mode.trace.events[0].op == mode.trace.events[-1].op, "2 and 2 share"


def test_a_changed_attribute_is_another_configuration(catching, mode):
    one, other = made(lambda: Scaled(2)), made(lambda: Scaled(2))
    with mode:
        assert one(X).tolist() == (X * 2).tolist()
        one.factor = 5
        assert one(X).tolist() == (X * 5).tolist()
        assert other(X).tolist() == (X * 2).tolist()
        one.factor = 2
        assert one(X).tolist() == (X * 2).tolist()
        one.train(False)
        one(X)
    assert mode.cache.stats().compiles == 3
    assert mode.cache.stats().hits == 5


def test_attributes_that_never_settle_are_left_to_vllm(catching, vllm_ran, mode):
    layer = made(lambda: Scaled(0))
    with mode:
        for step in range(8):
            layer.factor = step
            assert layer(X).tolist() == (X * step).tolist()
        assert vllm_ran == []
        for step in range(8, 12):
            layer.factor = step
            with pytest.warns(dc.DispatchCompileWarning, match="its attributes change") if step == 8 else nullcontext():
                assert layer(X).tolist() == (X * step).tolist()
    assert len(vllm_ran) == 4
    assert mode.cache.stats().compiles == 8


def test_classes_do_not_share(catching, mode):
    class Negated(Scaled):
        def forward_native(self, x: Tensor) -> Tensor:
            return x * -self.factor

    class Same(Scaled):
        pass

    with mode:
        for kind in (Scaled, Negated, Same):
            layer = made(lambda kind=kind: kind(2))
            assert layer(X).tolist() == layer.forward_native(X).tolist()
    assert len({event.op for event in mode.trace.events}) == 3


def test_a_class_may_have_the_name_that_another_classs_op_has(catching, mode):
    @registered("test_named")
    class Named(Scaled):
        pass

    @registered("test_named_2")
    class NamedTwo(Scaled):
        pass

    layers = [made(lambda: Named(2)), made(lambda: Named(3)), made(lambda: NamedTwo(4))]
    with mode:
        for layer in layers:
            assert layer(X).tolist() == (X * layer.factor).tolist()
    assert len({event.op for event in mode.trace.events}) == 3


def test_equal_tuples_share(catching, mode):
    first, second = (made(lambda: QuantFP8(False, GroupShape(1, 128))) for _ in range(2))
    with mode:
        first(torch.randn(4, 256)), second(torch.randn(4, 256))
    assert mode.cache.stats().compiles == 1


def test_vllms_dynamic_dims_are_the_activations(catching, mode):
    @registered("test_gate", dynamic_arg_dims={"hidden_states": 0, "gate": [0]})
    class Gate(CustomOp):
        def forward_native(self, hidden_states: Tensor, gate: Tensor, x_bias: Tensor) -> Tensor:
            return hidden_states * gate + x_bias

    layer = made(lambda: Gate(compile_native=True))
    with mode:
        for tokens in (2, 5, 9):
            layer(torch.ones(tokens, 4), torch.ones(tokens, 1), torch.ones(4))
    assert {event.specialization for event in mode.trace.events} == {"[s0, 4], [s0, 1], [4]"}
    assert mode.cache.stats().compiles == 1


# ---- What cannot become an op.


class Holding(Scaled):
    """A layer that holds something beside its factor."""

    def __init__(self, **attributes):
        super().__init__(2, **attributes)


class WithParameter(Scaled):
    def __init__(self):
        super().__init__(2)
        self.weight = torch.nn.Parameter(torch.ones(2))


class WithoutHints(Scaled):
    def forward_native(self, x):
        return x * self.factor


class WithAnyArguments(Scaled):
    def forward_native(self, *args: Tensor) -> Tensor:
        return args[0] * self.factor


class WithoutActivation(Scaled):
    def forward_native(self, hidden: Tensor) -> Tensor:
        return hidden * self.factor


class WithNoneAmongResults(Scaled):
    def forward_native(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x * self.factor, None


class WithNumberAsResult(Scaled):
    def forward_native(self, x: Tensor) -> int:
        return self.factor


class WithArgumentAsResult(Scaled):
    def forward_native(self, x: Tensor) -> Tensor:
        return x


class WithValuesThatDecide(Scaled):
    def forward_native(self, x: Tensor) -> Tensor:
        return x * self.factor if x.sum() > 0 else x + 1


class WithAnotherDynamicDim(Scaled):
    _dynamic_arg_dims = {"x": -1}  # noqa: RUF012 - as CustomOp.register sets it


LEFT = {
    "a tensor": (lambda: Holding(table=torch.ones(2)), "a Tensor in 'table'"),
    "a list": (lambda: Holding(sizes=[1]), "a list in 'sizes'"),
    "a list in a tuple": (lambda: Holding(sizes=([1],)), "a list in 'sizes'"),
    "an object": (lambda: Holding(config=object()), "an object in 'config'"),
    "a parameter": (WithParameter, "a Parameter in 'weight'"),
    "no type hints": (lambda: WithoutHints(2), "type hints"),
    "any arguments": (lambda: WithAnyArguments(2), "type hints"),
    "no activation": (lambda: WithoutActivation(2), "activation"),
    "None among results": (lambda: WithNoneAmongResults(2), "other than tensors"),
    "a number as result": (lambda: WithNumberAsResult(2), "other than tensors"),
    "an argument as result": (lambda: WithArgumentAsResult(2), "no new tensor"),
    "values that decide": (lambda: WithValuesThatDecide(2), "fake tensors"),
    "another dynamic dimension": (lambda: WithAnotherDynamicDim(2), "{'x': -1}"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_become_an_op_is_left_as_vllm_made_it(catching, vllm_ran, mode, caplog, case):
    make, reason = LEFT[case]
    layer = made(make)
    with mode:
        with pytest.warns(dc.DispatchCompileWarning) as warned:
            results = [layer(X), layer(X)]
        assert all(repr(result) == repr(layer.forward_native(X)) for result in results)
    assert len(vllm_ran) == 2
    [text] = [str(warning.message) for warning in warned if warning.category is dc.DispatchCompileWarning]
    assert type(layer).__qualname__ in text
    assert reason in text
    assert text in caplog.text
    assert len(mode.trace.events) == 0


def test_what_becomes_fit_is_caught(catching, vllm_ran, mode):
    layer = made(lambda: Holding(table=torch.ones(2)))
    with mode, pytest.warns(dc.DispatchCompileWarning, match="table"):
        layer(X)
    del layer.table
    with mode:
        assert layer(X).tolist() == (X * 2).tolist()
    assert (len(vllm_ran), mode.cache.stats().hits) == (1, 1)


def test_results_that_are_an_argument_now_and_then(catching, vllm_ran, mode):
    class NowAndThen(Scaled):
        def forward_native(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.factor, scale if scale.numel() == 1 else scale * 2

    layer = made(lambda: NowAndThen(2))
    one, two = torch.ones(1), torch.ones(2)
    with mode:
        assert layer(X, one)[1] is one
        with pytest.warns(dc.DispatchCompileWarning, match="in some calls and not in others"):
            assert layer(X, two)[1].tolist() == [2.0, 2.0]
        assert layer(X, one)[1] is one
    assert len(vllm_ran) == 2
    assert mode.cache.stats().hits == 1


def test_an_error_of_the_layers_own_is_its_own(catching, mode):
    layer = made(lambda: QuantFP8(False, GroupShape(1, 128)))
    x, scale = torch.randn(4, 256), torch.ones(1)
    with mode:
        error = outcome(layer, x, scale)
        assert isinstance(error, AssertionError), error
        layer(x)
    assert mode.cache.stats().hits == 1, "and it does not keep later calls from being caught"


# ---- Who else is there.


def test_a_mode_that_does_not_catch_or_compile_it_leaves_it_to_vllm(catching, vllm_ran):
    layer = made(lambda: Scaled(2))
    for mode in (
        dc.DispatchCompileMode(ops=["dispatch_compile"], config=EAGER),
        dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", providers=("aiter",))),
    ):
        with mode:
            layer(X)
    assert len(vllm_ran) == 2


@pytest.mark.parametrize("inside", [False, True], ids=["outside of modes", "inside a mode"])
def test_model_level_compilation_inlines_it_as_before(catching, mode, inside):
    layer = made(silu_and_mul)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def model(x):
        return layer(x + 1)

    x = torch.randn(4, 8)
    torch._dynamo.reset()
    if inside:
        with mode:
            result = model(x)
    else:
        result = model(x)
    torch.testing.assert_close(result, SiluAndMul.forward_native(x + 1))
    [graph] = graphs
    assert "vllm_custom_op" not in graph.code
    assert "silu" in graph.code


def test_other_modes_see_the_op_and_nothing_else(catching, mode):
    layer = made(silu_and_mul)
    with FlopCounterMode(display=False) as counter, mode:
        layer(torch.randn(4, 8))
    assert counter.get_total_flops() == 0
    assert mode.cache.stats().hits == 1


def test_a_first_call_with_fake_tensors_decides_nothing(catching, vllm_ran, mode):
    layer = made(silu_and_mul)
    with mode:
        with FakeTensorMode():
            fake = layer(torch.empty(4, 8))
        assert fake.shape == (4, 4)
        layer(torch.randn(4, 8))
    assert mode.cache.stats().hits == 1
    with mode, FakeTensorMode():
        assert layer(torch.empty(4, 8)).shape == (4, 4)


def test_first_calls_on_several_threads_make_one_op(catching, mode):
    layers = [made(lambda: Scaled(77)) for _ in range(8)]
    barrier = threading.Barrier(len(layers))

    def call(layer):
        barrier.wait()
        with mode:
            layer(X)

    threads = [threading.Thread(target=call, args=(layer,)) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({op_of(layer) for layer in layers}) == 1
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, len(layers))


def test_another_threads_compilation_makes_no_difference(catching, mode, monkeypatch):
    """While any thread compiles, ``is_compiling()`` is true on all."""
    layer = made(lambda: Scaled(2))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with mode:
        layer(X)
    assert len(mode.trace.events) == 1


# ---- Lifetime.


@pytest.mark.parametrize(
    "make", [silu_and_mul, lambda: QuantFP8(False, GroupShape.PER_TOKEN)], ids=["SiluAndMul", "QuantFP8"]
)
def test_nothing_keeps_an_instance_or_its_code_alive(catching, make):
    gc.collect()
    mode = dc.DispatchCompileMode(config=EAGER)
    first, second = made(make), made(make)
    with mode:
        first(torch.randn(4, 8)), second(torch.randn(4, 8))
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    assert len(mode.cache) == 1, "the other instance shares the code"
    with mode:
        second(torch.randn(4, 8))
    assert mode.cache.stats().compiles == 1
    name = op_of(second).name
    del second
    gc.collect()
    assert len(mode.cache) == 0
    assert name not in {op.name for op in _forward_op.forward_ops()}
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")


def test_a_copy_of_a_layer_works(catching, mode):
    layer = made(lambda: Scaled(2))
    with mode:
        layer(X)
        assert copy.deepcopy(layer)(X).tolist() == (X * 2).tolist()
    assert mode.cache.stats().hits == 2
