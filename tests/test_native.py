"""Plain functions and methods that run compiled inside a mode, and are themselves everywhere else."""

from __future__ import annotations

import dataclasses
import enum
import functools
import gc
import threading
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from support import EAGER, assert_same
from torch import Tensor, nn

import dispatch_compile as dc
from dispatch_compile._native import Native

LIMIT = 3.0
TABLE = torch.arange(8.0)
# A mode that sees every op sees a native's
pytestmark = [pytest.mark.long, pytest.mark.selective, pytest.mark.usefixtures("inference")]


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def mode():
    """Where it matters which calls are compiled, and not by what."""
    return dc.DispatchCompileMode(config=EAGER, trace=True)


@pytest.fixture
def inductor():
    return dc.DispatchCompileMode(config=dc.CompileConfig(on_failure="raise"), trace=True)


def actions(mode: dc.DispatchCompileMode) -> list[str]:
    return [event.action for event in mode.trace.events]


def reasons(mode: dc.DispatchCompileMode) -> list[str | None]:
    return [event.reason for event in mode.trace.events]


def check(mode: dc.DispatchCompileMode, fn: Any, *args: Any, compiled: bool = True, **kwargs: Any) -> Any:
    """Call ``fn`` in the mode; it must have run compiled, and give what it gives outside."""
    expected = fn(*args, **kwargs)
    with mode:
        actual = fn(*args, **kwargs)
    assert (mode.trace.events[-1].action == "compiled") is compiled, str(mode.trace)
    assert_close(actual, expected)
    return actual


def assert_close(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, equal_nan=True)
        assert actual.stride() == expected.stride()
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_close(actual[key], expected[key])
    elif dataclasses.is_dataclass(expected):
        assert_close(vars(actual), vars(expected))
    else:
        assert actual == expected


@dc.native
def gated(q, g, limit=7.0, *, kind="sigmoid"):
    gate = torch.sigmoid(g) if kind == "sigmoid" else torch.tanh(g)
    return q * gate.clamp(max=limit)


class TestCalls:
    def test_without_a_mode_it_is_the_function_itself(self):
        q, g = torch.randn(2, 4, 8)
        assert_same(gated(q, g), gated.__wrapped__(q, g))

    def test_every_way_to_give_the_arguments_shares_one_specialization(self, mode):
        q, g = torch.randn(2, 4, 8)
        for args, kwargs in [
            ((q, g), {}),
            ((q,), {"g": g}),
            ((), {"g": g, "q": q}),
            ((q, g, 7.0), {}),
            ((q, g), {"limit": 7.0, "kind": "sigmoid"}),
        ]:
            check(mode, gated, *args, **kwargs)
        assert mode.cache.stats().compiles == 1
        assert mode.cache.stats().hits == 5

    def test_what_is_not_a_tensor_is_baked_in(self, mode):
        q, g = torch.randn(2, 4, 8)
        check(mode, gated, q, g, kind="tanh")
        check(mode, gated, q, g, kind="sigmoid")
        check(mode, gated, q, g, 7)  # an integer is no float
        assert mode.cache.stats().compiles == 3

    def test_inside_an_opaque_op(self, mode):
        @torch.library.custom_op("test_native::body", mutates_args=())
        def body(x: Tensor) -> Tensor:
            return gated(x, x + 1)

        x = torch.randn(4, 8)
        with mode:
            body(x)
        assert [event.op for event in mode.trace.events] == [f"{__name__}.gated"]
        assert actions(mode) == ["compiled"]

    def test_generated_code_is_one_kernel(self, inductor):
        q, g = torch.randn(2, 4, 8)
        with inductor:
            gated(q, g)
        code = inductor.explain(gated, q, g).generated_code
        assert code is not None
        assert code.count("async_compile.cpp_pybinding(") == 1

    def test_malformed_calls_raise_as_the_function_does(self, mode):
        x = torch.randn(4, 8)
        for args, kwargs in [((), {}), ((x, x, 1.0, 2.0), {}), ((x, x), {"nope": 1}), ((x,), {"q": x, "g": x})]:
            with pytest.raises(TypeError) as outside:
                gated(*args, **kwargs)
            with mode, pytest.raises(TypeError) as inside:
                gated(*args, **kwargs)
            assert str(inside.value) == str(outside.value)

    def test_errors_are_those_of_the_function(self, mode):
        @dc.native
        def mismatched(a, b):
            return a @ b

        a, b = torch.randn(4, 8), torch.randn(4, 8)
        with pytest.raises(RuntimeError) as outside:
            mismatched(a, b)
        with mode, pytest.raises(RuntimeError) as inside:
            mismatched(a, b)
        assert str(inside.value) == str(outside.value)

    def test_a_mode_that_does_not_select_it(self):
        mode = dc.DispatchCompileMode(ops=["dispatch_compile"], trace=True)
        with mode:
            gated(*torch.randn(2, 4, 8))
        assert not mode.trace.events

    @pytest.mark.parametrize("item", [gated, f"{__name__}.gated", __name__], ids=["function", "name", "module"])
    def test_a_mode_that_selects_it(self, item):
        mode = dc.DispatchCompileMode(ops=[item], trace=True)
        with mode:
            gated(*torch.randn(2, 4, 8))
        assert actions(mode) == ["compiled"]

    def test_nested_modes_of_which_the_outer_selects_it(self, mode):
        with mode, dc.DispatchCompileMode(ops=["dispatch_compile"]):
            gated(*torch.randn(2, 4, 8))
        assert actions(mode) == ["compiled"]


class Size(enum.Enum):
    SMALL, LARGE = 1, 2


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@dataclasses.dataclass(frozen=True)
class Routed:
    weights: Tensor
    count: int
    parts: list[Tensor]


class TestArguments:
    @pytest.mark.parametrize(
        "argument",
        [
            None,
            True,
            3,
            "text",
            2.5,
            torch.float16,
            torch.device("cpu"),
            Size.LARGE,
            (1, 2),
            [1, [2.0, None]],
            {"a": 1},
            nn.functional.silu,
        ],
        ids=lambda argument: getattr(argument, "__name__", None) or str(argument),
    )
    def test_constants(self, mode, argument):
        @dc.native
        def used(q, constant):
            if constant == argument:
                return q + 1
            return q - 1

        q = torch.randn(4, 3)
        check(mode, used, q, argument)
        check(mode, used, q, "another")
        check(mode, used, q, argument)
        assert mode.cache.stats().compiles == 2

    def test_tensors_in_lists_tuples_dictionaries_and_named_tuples(self, mode):
        @dc.native
        def nested(parts, pair, named, *rest, **more):
            return parts[0] + parts[1][0] + pair.first * named["scale"] + rest[0] + more["last"]

        a, b, c, d, e, f = torch.randn(6, 4, 3)
        for _ in range(2):
            check(mode, nested, [a, (b,)], Pair(c, None), {"scale": d}, e, last=f)
        check(mode, nested, [a, (b,), a + 1], Pair(c, d), {"scale": d + 1}, e, last=f)
        assert mode.cache.stats().compiles == 2

    def test_a_tuple_and_a_list_are_told_apart(self, mode):
        @dc.native
        def kind(q, given):
            return q + (1 if isinstance(given, tuple) else 2)

        q = torch.randn(4)
        for given in ((1,), [1], (1,)):
            check(mode, kind, q, given)

    def test_a_list_that_is_changed_steps_aside(self, mode):
        @dc.native
        def appends(q, seen):
            seen.append(1)
            return q + len(seen)

        q, seen = torch.randn(4), []
        with mode:
            appends(q, seen)
        assert seen == [1]
        assert reasons(mode) == ["the implementation changes a list or dictionary that it is given"]

    def test_no_tensor(self, mode):
        @dc.native
        def made(count):
            return torch.arange(count)

        with mode:
            assert_same(made(3), torch.arange(3))
        assert reasons(mode) == ["it takes no tensor"]

    def test_what_cannot_be_read_steps_aside(self, mode):
        @dc.native
        def drawn(q, generator):
            return q + 1

        check(mode, drawn, torch.randn(3), torch.Generator(), compiled=False)
        assert reasons(mode) == ["generator is a Generator"]

    def test_tensors_that_need_autograd(self, mode):
        with torch.inference_mode(False):
            q = torch.randn(4, 8, requires_grad=True)
            with mode:
                gated(q, q + 1).sum().backward()
        assert q.grad is not None
        assert reasons(mode) == ["q requires grad and grad mode is on"]


class TestResults:
    def test_each_kind(self, mode):
        @dc.native
        def several(q):
            y, z = q + 1, q * 2
            return {"y": y, 3: (z, None, 7, "text")}, [y, Pair(z, None)], Routed(y, 2, [z]), True

        result = check(mode, several, torch.randn(4, 3))
        with mode:
            result = several(torch.randn(4, 3))
        assert result[0]["y"] is result[1][0]  # as in eager

    def test_an_argument_that_is_returned_is_the_same_tensor(self, mode):
        @dc.native
        def returned(q, residual):
            return q + residual, residual

        q, residual = torch.randn(2, 4, 3)
        assert check(mode, returned, q, residual)[1] is residual

    def test_sizes(self, mode):
        @dc.native
        def sized(x):
            return x + 1, x.shape[0], x.shape[1]

        for count in (4, 6):
            check(mode, sized, torch.randn(count, 3))

    def test_views_of_an_argument_step_aside(self, mode):
        @dc.native
        def part(q):
            return q[:2]

        check(mode, part, torch.randn(4, 3), compiled=False)
        assert reasons(mode) == ["result 0 shares memory with argument q"]

    def test_other_objects_step_aside(self, mode):
        @dc.native
        def odd(q):
            return {1.5: q + 1}, object

        with mode:
            odd(torch.randn(3))
        assert reasons(mode) == ["the implementation returns a dict"]


class Scaled(nn.Module):
    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))
        self.register_buffer("offset", torch.randn(8))
        self.eps, self.options, self.act = eps, {"scale": 2.0}, nn.SiLU()
        self.calls = 0

    @dc.native
    def forward(self, h):
        return self.act(h * self.weight + self.offset) * self.options["scale"] + self.eps

    @dc.native
    def counting(self, h):
        self.calls += 1
        return h + self.calls

    @property
    def shifted(self) -> Tensor:
        return self.weight + 1

    @dc.native
    def by_property(self, h):
        return h * self.shifted + getattr(self, "bias", 0)

    def plain(self, h):
        return h * self.weight


class TestObjects:
    def test_tensors_are_inputs_and_attributes_guarded(self, mode):
        layers = [Scaled(), Scaled(), Scaled(1e-3)]
        h = torch.randn(4, 8)
        for layer in layers:
            check(mode, layer.forward, h)
        assert mode.cache.stats().compiles == 2  # eps differs
        layers[0].weight = nn.Parameter(torch.randn(8))
        layers[1].weight.copy_(torch.ones(8))
        for layer in layers:
            check(mode, layer.forward, h)
        assert mode.cache.stats().compiles == 2
        layers[0].options["scale"] = 5.0
        check(mode, layers[0].forward, h)
        layers[0].act = nn.GELU()
        check(mode, layers[0].forward, h)
        assert mode.cache.stats().compiles == 4

    def test_an_attribute_whose_list_is_changed_steps_aside(self, mode):
        class Counting:
            def __init__(self):
                self.seen = []

            @dc.native
            def count(self, h):
                self.seen.append(1)
                return h + len(self.seen)

        counting, h = Counting(), torch.zeros(3)
        with mode:
            counting.count(h)
            assert_same(counting.count(h), torch.full((3,), 2.0))
        assert counting.seen == [1, 1]
        assert set(reasons(mode)) == {"the implementation changes a list or dictionary that it is given"}

    def test_an_attribute_that_is_set_steps_aside(self, mode):
        layer = Scaled()
        with mode:
            layer.counting(torch.randn(4, 8))
        assert layer.calls == 1
        assert reasons(mode) == ["the implementation sets or deletes self.calls"]

    def test_properties_and_attributes_that_come_later(self, mode):
        layer, h = Scaled(), torch.randn(4, 8)
        check(mode, layer.by_property, h)
        layer.bias = 3
        check(mode, layer.by_property, h)
        assert mode.cache.stats().compiles == 2

    def test_a_bound_method(self, mode):
        layers, h = [Scaled(), Scaled()], torch.randn(4, 8)
        for layer in layers:
            check(mode, dc.native(layer.plain), h)
        assert mode.cache.stats().compiles == 1

    def test_an_object_of_another_class(self, mode):
        class Settings:
            def __init__(self, scale):
                self.scale = scale

        @dc.native
        def scaled(q, settings):
            return q * settings.scale

        q = torch.randn(3)
        for scale in (2, torch.randn(3), 2.5):
            check(mode, scaled, q, Settings(scale))

    def test_the_weight_is_no_constant_of_the_code(self, mode):
        layer, h = Scaled(), torch.randn(4, 8)
        check(mode, layer.forward, h)
        reference = weakref.ref(layer.weight)
        del layer
        mode.trace.clear()
        gc.collect()
        assert reference() is None


class TestOutside:
    def test_closed_over_tensors_and_numbers(self, mode):
        weight, scale = torch.randn(8), 2.0

        @dc.native
        def projected(q):
            return q * weight * scale

        q = torch.randn(4, 8)
        check(mode, projected, q)
        weight = torch.randn(8)
        check(mode, projected, q)
        assert mode.cache.stats().compiles == 1
        scale = 3.0
        check(mode, projected, q)
        assert mode.cache.stats().compiles == 2

    def test_globals(self, mode, monkeypatch):
        def helper(q):
            return q + LIMIT

        @dc.native
        def limited(q):
            return helper(q).clamp(max=LIMIT) * TABLE

        q = torch.randn(4, 8)
        check(mode, limited, q)
        monkeypatch.setattr(f"{__name__}.LIMIT", 1.0)
        check(mode, limited, q)
        assert mode.cache.stats().compiles == 2
        with torch.inference_mode(False):
            monkeypatch.setattr(f"{__name__}.TABLE", torch.ones(8))
        check(mode, limited, q)
        assert mode.cache.stats().compiles == 2

    def test_a_closed_over_module(self, mode):
        layer = Scaled()

        @dc.native
        def through(h):
            return layer.plain(h) + 1

        h = torch.randn(4, 8)
        check(mode, through, h)
        layer.weight.add_(1)
        check(mode, through, h)
        assert mode.cache.stats().compiles == 1


class TestMutation:
    def test_an_argument_that_is_written(self, inductor):
        @dc.native
        def doubled(out, a):
            out.copy_(a * 2)

        for count in (4, 6, 9):
            out, a = torch.empty(count, 3), torch.randn(count, 3)
            with inductor:
                assert doubled(out, a) is None
            assert_same(out, a * 2)
        assert actions(inductor) == ["compiled"] * 3
        assert inductor.cache.stats().compiles == 2

    def test_in_place_and_returned(self, inductor):
        @dc.native
        def shifted_(q, by):
            return q.add_(by)

        q = torch.zeros(4)
        for expected in (1.0, 2.0, 3.0):
            with inductor:
                assert shifted_(q, 1) is q
            assert_same(q, torch.full((4,), expected))
        assert actions(inductor) == ["compiled"] * 3

    def test_columns_of_one_matrix(self, inductor):
        @dc.native
        def rotated_(q, k):
            q.neg_()
            k.mul_(2)

        for count in (4, 5, 7):
            qkv = torch.randn(count, 12)
            expected = torch.cat([-qkv[:, :4], qkv[:, 4:8] * 2, qkv[:, 8:]], 1)
            with inductor:
                rotated_(qkv[:, :4], qkv[:, 4:8])
            assert_same(qkv, expected)
        assert actions(inductor) == ["compiled"] * 3

    def test_tensors_that_share_memory_step_aside(self, inductor):
        @dc.native
        def doubled(out, a):
            out.copy_(a * 2)

        for begin in (0, 4, 1):
            memory = torch.randn(4, 12)
            expected = memory.clone()
            doubled(expected[:, :4], expected[:, begin : begin + 4])
            with inductor:
                doubled(memory[:, :4], memory[:, begin : begin + 4])
            assert_same(memory, expected)
        assert actions(inductor) == ["aside", "compiled", "aside"]
        assert reasons(inductor)[2] == "out, which is written, shares memory with a"

    def test_expanded_tensors_step_aside(self, inductor):
        @dc.native
        def shifted_(q):
            q.add_(1)

        q = torch.zeros(1, 4).expand(3, 4)
        with inductor, pytest.raises(RuntimeError, match="single memory location"):
            shifted_(q)

    def test_versions_are_counted(self, inductor):
        @dc.native
        def shifted_(q):
            q.add_(1)

        with torch.inference_mode(False), torch.no_grad():
            q = torch.zeros(4)
            with inductor:
                shifted_(q)
            assert q._version == 1
        assert actions(inductor) == ["compiled"]

    def test_what_is_declared_is_obeyed(self, inductor):
        @dc.native(mutates_args=["out"])
        def both(out, a):
            out.copy_(a)
            a.zero_()

        out, a = torch.zeros(4), torch.ones(4)
        with inductor:
            both(out, a)
        assert_same((out, a), (torch.ones(4), torch.zeros(4)))
        assert reasons(inductor) == ["the implementation changes its argument a, which is not declared as mutated"]

    def test_a_buffer_of_a_module(self, inductor):
        class Cache(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("kept", torch.zeros(8, 3))

            @dc.native
            def put(self, rows, values):
                self.kept.index_copy_(0, rows, values)

        cache = Cache()
        for count in (2, 3, 4):
            values = torch.randn(count, 3)
            with inductor:
                cache.put(torch.arange(count), values)
            assert_same(cache.kept[:count].clone(), values)
        assert actions(inductor) == ["compiled"] * 3

    def test_an_op_that_writes_to_a_list_of_tensors(self, inductor):
        def reference(y: Tensor, outs: list[Tensor]) -> None:
            for i, out in enumerate(outs):
                out.copy_(y * i)

        with torch.library._scoped_library("test_native_lists", "FRAGMENT") as library:
            library.define("several(Tensor y, Tensor(a!)[] outs) -> ()")
            library.impl("several", reference, "CompositeExplicitAutograd")
            handle = dc.register_native("test_native_lists::several", reference)
            for count in (4, 5):
                y, outs = torch.randn(count), [torch.empty(count) for _ in range(3)]
                with inductor:
                    torch.ops.test_native_lists.several(y, outs)
                assert_same(outs, [y * i for i in range(3)])
            handle.remove()
        assert actions(inductor) == ["compiled"] * 2

    @pytest.mark.parametrize("schema", ["(Tensor(a!) out, Tensor x) -> ()", "(Tensor(a!) out, Tensor x) -> Tensor(a!)"])
    def test_ops_of_other_libraries(self, inductor, schema):
        returned = schema.endswith("(a!)")

        def kernel(out, x):
            out.copy_(x * 2)
            return out if returned else None

        if returned:

            def reference(out: Tensor, x: Tensor) -> Tensor:
                return out.copy_(x * 2)
        else:

            def reference(out: Tensor, x: Tensor) -> None:
                out.copy_(x * 2)

        with torch.library._scoped_library("test_native_mutating", "FRAGMENT") as library:
            library.define(f"double{schema}")
            library.impl("double", kernel, "CompositeExplicitAutograd")
            op = torch.ops.test_native_mutating.double
            handle = dc.register_native("test_native_mutating::double", reference)
            for count in (4, 5, 6):
                out, x = torch.empty(count, 3), torch.randn(count, 3)
                with inductor:
                    result = op(out, x)
                assert_same(out, x * 2)
                assert result is (out if returned else None)
            handle.remove()
        assert actions(inductor) == ["compiled"] * 3


class TestDynamicSizes:
    COUNTS = (7, 1, 2, 3, 16384, 64, 1000, 5, 4096, 1, 12)

    def test_any_name(self, inductor):
        @dc.native
        def routed(hidden, scores, mask):
            return hidden * scores.unsqueeze(-1), torch.where(mask, scores, 0)

        for count in self.COUNTS:
            check(inductor, routed, torch.randn(count, 4), torch.randn(count), torch.randn(count) > 0)
        assert inductor.cache.stats().compiles <= 3
        assert inductor.trace.events[2].difference == "hidden, scores, mask dynamic since the second token count"

    def test_some_named_x(self, inductor):
        @dc.native
        def gate(x, g):
            return x * torch.sigmoid(g)

        for count in self.COUNTS:
            check(inductor, gate, *torch.randn(2, count, 4))
        assert inductor.cache.stats().compiles <= 3

    def test_multiples_of_the_token_count(self, inductor):
        @dc.native
        def combined(hidden, ids):
            return hidden.repeat_interleave(2, 0) * ids.unsqueeze(-1), ids.view(-1, 2).sum(1)

        for count in self.COUNTS:
            check(inductor, combined, torch.randn(count, 4), torch.randn(2 * count))
        assert inductor.cache.stats().compiles <= 3

    def test_ops_of_other_libraries(self, inductor):
        def gate(x: Tensor, g: Tensor) -> Tensor:
            return x * torch.sigmoid(g)

        with torch.library._scoped_library("test_native_gate", "FRAGMENT") as library:
            library.define("gate(Tensor x, Tensor g) -> Tensor")
            library.impl("gate", gate, "CompositeExplicitAutograd")
            handle = dc.register_native("test_native_gate::gate", gate)
            for count in self.COUNTS:
                check(inductor, torch.ops.test_native_gate.gate, *torch.randn(2, count, 4))
            handle.remove()
        assert inductor.cache.stats().compiles <= 3

    def test_another_stride_is_not_another_token_count(self, mode):
        @dc.native
        def doubled(hidden):
            return hidden * 2

        memory = torch.randn(8, 256)
        for rows in (64, 128, 192):
            check(mode, doubled, memory.as_strided((4, 16), (rows, 1)))
        check(mode, doubled, memory.as_strided((3, 16), (192, 1)))
        assert [event.difference for event in mode.trace.events] == [
            None,
            "hidden's stride is [128, 1], was [64, 1]",
            "hidden's stride is [192, 1], was [128, 1]",
            "hidden dynamic since the second token count",
        ]

    def test_objects_of_another_class_are_told(self, mode):
        class Doubling:
            factor = 2

            @dc.native
            def scaled(self, hidden):
                return hidden * self.factor

        class Tripling(Doubling):
            factor = 2

        for kind in (Doubling, Tripling):
            check(mode, kind().scaled, torch.randn(4, 3))
        assert mode.trace.events[1].difference.startswith("self is ")

    def test_activations_that_are_given_are_obeyed(self, inductor):
        @dc.native(activations=["q"])
        def added(q, table):
            return q + table.sum()

        for count in (4, 5, 6):
            check(inductor, added, torch.randn(count, 3), torch.randn(8, 3))
        assert inductor.cache.stats().compiles == 1
        for count in (4, 5, 6):
            check(inductor, added, torch.randn(8, 3), torch.randn(count, 3))
        assert inductor.cache.stats().compiles == 4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
    @pytest.mark.parametrize("values", [(0.2, 0.3, 0.4, 0.7, -1.5, float("inf")), (2, 3, 5, 7, -1, 0, 2**40)])
    def test_numbers_that_keep_changing(self, inductor, dtype, values):
        @dc.native
        def scaled(q, scale):
            return q * scale, q + scale, q - scale, torch.where(q > scale, q, scale)

        q = torch.arange(-256, 256).view(64, 8).div(2).to(dtype)  # none is nearly as large as a value
        for value in values:
            check(inductor, scaled, q, value)
        assert inductor.cache.stats().compiles <= 3
        assert inductor.trace.events[2].difference == "scale dynamic since the third value"

    def test_numbers_on_which_the_result_is_built(self, inductor):
        @dc.native
        def repeated(q, times, scale):
            for _ in range(times):
                q = q + scale
            return q if scale > 0.5 else q - 1

        for times, scale in [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.6), (1, 0.7), (3, 0.9), (0, 0.2)]:
            check(inductor, repeated, torch.randn(4), times, scale)

    def test_two_values_stay_constants(self, inductor):
        @dc.native
        def scaled(q, scale):
            return q * scale

        for value in (0.2, 0.3, 0.2, 0.3):
            check(inductor, scaled, torch.randn(4), value)
        assert inductor.cache.stats().compiles == 2


class TestCompositions:
    def test_a_native_in_a_native_is_fused_and_shown(self, inductor):
        @dc.native(name="inner")
        def inner(h):
            return torch.sigmoid(h) * h

        @dc.native(name="outer")
        def outer(h):
            return inner(dc.ops.silu_and_mul(h)) + 1

        h = torch.randn(4, 64)
        check(inductor, outer, h)
        [event] = inductor.trace.events
        assert event.fuses == ("silu_and_mul", "inner")
        code = inductor.explain(outer, h).generated_code
        assert code is not None
        assert code.count("async_compile.cpp_pybinding(") == 1

    def test_what_the_inner_one_reads_outside_of_itself_is_guarded(self, mode, monkeypatch):
        @dc.native
        def inner(h):
            return h * LIMIT

        @dc.native
        def outer(h):
            return inner(h) + 1

        h = torch.randn(4)
        check(mode, outer, h)
        monkeypatch.setattr(f"{__name__}.LIMIT", 1.0)
        check(mode, outer, h)
        assert mode.cache.stats().compiles == 2


class TestTracing:
    def test_model_level_compilation_sees_the_function(self):
        def graph_of(function: Any) -> str:
            graphs = []

            def backend(graph, inputs):
                graphs.append(graph.print_readable(print_output=False))
                return graph

            torch._dynamo.reset()
            compiled = torch.compile(lambda q, g: function(q + 1, g) * 2, fullgraph=True, backend=backend)
            with dc.DispatchCompileMode():
                compiled(*torch.randn(2, 4, 8))
            [graph] = graphs
            return "\n".join(line for line in graph.splitlines() if "# File" not in line)

        assert graph_of(gated) == graph_of(gated.__wrapped__)

    def test_a_method_of_a_model(self, mode):
        layer = Scaled()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        h = torch.randn(4, 8)
        with mode:
            assert_same(compiled(h), layer.act(h * layer.weight + layer.offset) * 2 + layer.eps)
        assert not mode.trace.events

    def test_make_fx_and_export(self, mode):
        from torch.fx.experimental.proxy_tensor import make_fx

        q, g = torch.randn(2, 4, 8)
        with mode:
            graph = make_fx(lambda q, g: gated(q, g))(q, g)
        assert "sigmoid" in graph.code

        class Model(nn.Module):
            def forward(self, q, g):
                return gated(q, g)

        with torch.inference_mode(False), torch.no_grad(), mode:
            q, g = torch.randn(2, 4, 8)
            assert "sigmoid" in torch.export.export(Model(), (q, g)).graph_module.code
            assert "sigmoid" in torch.export.export(Model(), (q, g), strict=True).graph_module.code

    def test_transforms_and_other_modes(self, mode):
        q, g = torch.randn(2, 4, 8)
        from torch.overrides import TorchFunctionMode
        from torch.utils._python_dispatch import TorchDispatchMode

        class Functions(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        class Ops(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        with mode:
            gated(q, g)  # there is code that must not run now
            for other in (Functions(), Ops()):
                seen: list[Any] = []
                with other:
                    gated(q, g)
                assert len(seen) >= 3
            with torch.inference_mode(False), torch.no_grad():
                assert_close(torch.func.vmap(gated)(q.clone(), g.clone()), gated.__wrapped__(q, g))
                traced = torch.jit.trace(gated.__wrapped__, (q.clone(), g.clone()))
                assert "sigmoid" in str(torch.jit.trace(lambda q, g: gated(q, g), (q.clone(), g.clone())).graph)
                del traced


class TestDecoration:
    def test_a_compiled_function_is_replaced_by_its_original(self, mode):
        def leaf(q):
            return torch.sigmoid(q) * 2

        compiled = dc.native(torch.compile(leaf, dynamic=True))
        check(mode, compiled, torch.randn(4, 8))
        assert compiled.__wrapped__ is leaf

    def test_partial(self, mode):
        part = dc.native(functools.partial(gated.__wrapped__, limit=0.5))
        check(mode, part, *torch.randn(2, 4, 8))

    def test_static_and_class_methods(self, mode):
        class Ops:
            scale = 3.0

            @dc.native
            @staticmethod
            def one(q):
                return q + 1

            @staticmethod
            @dc.native
            def two(q):
                return q + 2

            @dc.native
            @classmethod
            def three(cls, q):
                return q * 3

        for method in (Ops.one, Ops.two, Ops.three, Ops().three):
            check(mode, method, torch.randn(4))

    def test_names_and_two_functions_of_one_name(self, mode):
        def make(by):
            @dc.native
            def shifted(q):
                return q + by

            return shifted

        one, two = make(1), make(2)
        with mode:
            one(torch.randn(3))
            two(torch.randn(3))
        first, second = (event.op for event in mode.trace.events)
        assert first.startswith(f"{__name__}.TestDecoration.test_names_and_two_functions_of_one_name.<locals>.make")
        assert second == f"{first}#2"
        assert len(mode.cache) == 2

    def test_a_name_of_its_own(self, mode):
        named = dc.native(gated.__wrapped__, name="mylib.gate")
        check(mode, named, *torch.randn(2, 4, 8))
        assert mode.trace.events[-1].op == "mylib.gate"

    def test_metadata_stays(self):
        assert gated.__name__ == "gated"
        assert dc.native(gated) is gated

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: 3, "3 cannot be called; give it a function"),
            (lambda: nn.Linear(2, 2), "a Linear is a module; give its method"),
            (lambda: nn.Linear, "Linear is a class; decorate the methods that compute"),
            (lambda: torch.sigmoid, "is not written in Python, so it cannot be traced; wrap it in a function"),
            (lambda: torch.ops.aten.add, "is an op; give it a reference implementation with register_native"),
            (lambda: dc.ops.silu_and_mul, "is an op; give it a reference implementation with register_native"),
            (lambda: torch.compile(nn.Linear(2, 2)), "is a module; give its method"),
        ],
    )
    def test_what_cannot_be_a_native(self, make, message):
        with pytest.raises(TypeError, match="native: ") as raised:
            dc.native(make())
        assert message in str(raised.value)

    def test_functions_that_do_not_compute_when_called(self):
        async def coroutine(q):
            return q

        def generator(q):
            yield q

        async def both(q):
            yield q

        for fn in (coroutine, generator, both):
            with pytest.raises(TypeError, match="does not compute when it is called; decorate a plain function"):
                dc.native(fn)

    @pytest.mark.parametrize("option", ["activations", "mutates_args"])
    def test_options(self, option):
        with pytest.raises(ValueError, match=rf"{option} \['nope'\] are not among the parameters"):
            dc.native(lambda q: q, **{option: ["nope"]})
        with pytest.raises(TypeError, match=f"{option} is a list of names"):
            dc.native(**{option: "q"})
        with pytest.raises(TypeError, match=f"{option} must be a list of names, not 3"):
            dc.native(**{option: 3})

    def test_it_is_freed_with_its_function(self, mode):
        def make():
            @dc.native
            def shifted(q):
                return q + 1

            check(mode, shifted, torch.randn(3))
            return weakref.ref(shifted.__wrapped__), shifted.dispatch_compile_native.name

        reference, name = make()
        mode.trace.clear()
        gc.collect()
        assert reference() is None
        assert name not in Native.registry
        assert len(mode.cache) == 0


def test_explain(mode):
    q, g = torch.randn(2, 4, 8)
    explained = mode.explain(gated, q, g=g)
    assert (explained.action, explained.new, explained.specialization) == ("compiled", True, "[4, 8], [4, 8]")
    check(mode, gated, q, g)
    assert mode.explain(gated, q, g).new is False
    assert mode.explain(gated, q[:3], g[:3]).difference == "q, g dynamic since the second token count"
    layer = Scaled()
    assert mode.explain(Scaled.forward, layer, q).action == "compiled"
    assert mode.cache.stats().compiles == 1


def test_trace(mode):
    layer = Scaled()
    with mode:
        layer.forward(torch.randn(4, 8))
        gated(*torch.randn(2, 4, 8), limit=0.5)
    assert str(mode.trace) == (
        f"{__name__}.Scaled.forward(<Scaled>, t: f32[4, 8])  ->  t: f32[4, 8]  "
        "# compiled native, new: [8], [8], [4, 8]\n"
        f"{__name__}.gated(t: f32[4, 8], t: f32[4, 8], limit=0.5)  ->  t: f32[4, 8]  "
        "# compiled native, new: [4, 8], [4, 8]"
    )


class TestReturned:
    """Results beside tensors in lists, tuples, dictionaries and classes."""

    def test_named_results_of_torch_sizes_and_numbers(self, mode):
        @dc.native
        def several(q, k, scale):
            return q.topk(k, -1), torch.sort(q), q.shape, k, scale, float("inf"), -0.0

        for count, k, scale in [(3, 1, 0.5), (4, 2, 1.5), (5, 3, 2.5), (6, 4, 3.5)]:
            check(mode, several, torch.randn(count, 8), k, scale)


def test_an_attribute_that_comes_and_goes(mode):
    class Layer(nn.Module):
        @dc.native
        def forward(self, h):
            return h * self.late if hasattr(self, "late") else h + 1

    layer, h = Layer(), torch.randn(4)
    check(mode, layer.forward, h)
    layer.late = 3.0
    check(mode, layer.forward, h)
    del layer.late
    layer.register_buffer("late", torch.ones(4))
    check(mode, layer.forward, h)
    layer.late = torch.zeros(4)
    check(mode, layer.forward, h)
    del layer.late
    check(mode, layer.forward, h)


def test_a_class_is_freed_with_its_method(mode):
    def make():
        class Layer:
            weight = 2.0

            @dc.native
            def forward(self, q):
                return q * self.weight

        check(mode, Layer().forward, torch.randn(3))
        return weakref.ref(Layer)

    reference = make()
    mode.trace.clear()
    gc.collect()
    assert reference() is None
    assert len(mode.cache) == 0


def test_first_calls_on_several_threads_at_once():
    natives = [dc.native(lambda q, by=by: q + by) for by in range(8)]
    mode = dc.DispatchCompileMode(config=EAGER)
    barrier, failed = threading.Barrier(8), []

    def call():
        with torch.inference_mode(), mode:
            barrier.wait()
            for by, one in enumerate(natives):
                if not torch.equal(one(torch.zeros(3)), torch.full((3,), float(by))):
                    failed.append(by)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert mode.cache.stats().hits == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_round_as_in_eager(inductor, dtype):
    @dc.native
    def computed(q, by):
        return q + by, q - by, by - q, q.clone().add_(by), q.clone().mul_(by), q.clone().sub_(by)

    for by in (0.2, 0.3, 0.7, -1.7):
        q = (torch.arange(-64, 64) / 16).to(dtype)
        for actual, expected in zip(check(inductor, computed, q, by), computed(q, by), strict=True):
            assert_same(actual, expected)
    assert inductor.cache.stats().compiles == 3
