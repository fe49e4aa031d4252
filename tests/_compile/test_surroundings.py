"""Natives, and what they read, and do, of the program around them."""

from __future__ import annotations

import functools
import gc
import os
import random
import sys
import time
import typing
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
from support import EAGER, EAGER_OR_NATIVE, assert_same

import dispatch_compile as dc

pytestmark = [pytest.mark.selective, pytest.mark.filterwarnings("ignore:.*it runs eagerly")]

HELPERS = """
import functools, torch
LIMIT, TENSOR, KNOWN = 1.0, torch.ones(4), {}

def limited(q): return q * LIMIT
def scaled(q): return q * TENSOR

class Settings:
    limit = 1.0

class Limited:
    def __call__(self, q): return q * LIMIT

def remembered(n):
    if n not in KNOWN:
        KNOWN[n] = torch.arange(n) * 1.0
    return KNOWN[n]

@functools.lru_cache
def cached(n): return torch.arange(n) * 1.0

def twice(q): return q * 2
"""


@pytest.fixture
def helpers(monkeypatch):
    module = ModuleType("test_surroundings_helpers")
    exec(HELPERS, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def mode():
    with torch.inference_mode():
        yield dc.DispatchCompileMode(config=EAGER_OR_NATIVE, trace=True)


def check(mode: dc.DispatchCompileMode, fn: Any, *args: Any) -> str | None:
    """Call ``fn`` in the mode; it must give what it gives outside. Why it did not run compiled, if it did not."""
    expected = fn(*args)
    with mode:
        assert_same(fn(*args), expected)
    return mode.trace.events[-1].reason


class TestWhatIsRead:
    """It may change between calls."""

    def test_an_attribute_of_a_module(self, mode, helpers):
        @dc.native
        def native(q):
            return q * helpers.LIMIT

        for limit in (1.0, 2.0, 1.0):
            helpers.LIMIT = limit
            assert check(mode, native, torch.ones(4)) is None
        assert mode.cache.stats().compiles == 2
        assert "helpers.LIMIT has changed" in mode.trace.events[1].difference

    @pytest.mark.parametrize("name", ["limited", "Limited"])
    def test_a_global_of_a_helper(self, mode, helpers, name):
        helper = helpers.limited if name == "limited" else helpers.Limited()

        @dc.native
        def native(q):
            return helper(q)

        @dc.native
        def through_module(q):
            return helpers.limited(q)

        for limit in (1.0, 2.0):
            helpers.LIMIT = limit
            assert check(mode, native, torch.ones(4)) is None
            assert check(mode, through_module, torch.ones(4)) is None

    def test_an_attribute_of_a_class(self, mode, helpers):
        settings = helpers.Settings

        @dc.native
        def native(q):
            return q * helpers.Settings.limit

        for limit in (1.0, 2.0):
            settings.limit = limit
            assert check(mode, native, torch.ones(4)) is None

    def test_a_function_that_is_replaced(self, mode, helpers):
        @dc.native
        def native(q):
            return helpers.twice(q)

        assert check(mode, native, torch.ones(4)) is None
        helpers.twice = lambda q: q * 3
        assert check(mode, native, torch.ones(4)) is None
        assert mode.cache.stats().compiles == 2

    def test_a_global_of_a_method_or_property(self, mode, helpers):
        class Layer:
            @property
            def limit(self):
                return helpers.LIMIT

            def inner(self, q):
                return q + helpers.LIMIT

            @dc.native
            def forward(self, q):
                return self.inner(q) * self.limit

        layer = Layer()
        for limit in (1.0, 2.0):
            helpers.LIMIT = limit
            assert check(mode, layer.forward, torch.ones(4)) is None

    def test_a_tensor_that_cannot_be_an_input(self, mode, helpers):
        @dc.native
        def native(q):
            return q * helpers.TENSOR

        for value in (1.0, 2.0):
            helpers.TENSOR = torch.full((4,), value)
            reason = check(mode, native, torch.ones(4))
            assert "it reads the tensor helpers.TENSOR, which is no input of the code" in (reason or "")

    def test_an_attribute_that_a_module_computes(self, mode, helpers, monkeypatch):
        exec("import os\ndef __getattr__(name): return float(os.environ[name])", vars(helpers))

        @dc.native
        def native(q):
            return q * helpers.TEST_SURROUNDINGS

        for value in ("1.0", "2.0"):
            monkeypatch.setenv("TEST_SURROUNDINGS", value)
            assert check(mode, native, torch.ones(4)) is None

    def test_defaults(self, mode):
        @dc.native
        def native(q, factor=torch.ones(4), more=[1.0]):  # noqa: B006, B008
            return q * factor * more[0]

        factor, more = native.__wrapped__.__defaults__
        assert check(mode, native, torch.ones(4)) is None
        factor.fill_(2.0)
        more[0] = 3.0
        assert check(mode, native, torch.ones(4)) is None

    def test_what_stays_costs_nothing(self, mode):
        @dc.native
        def native(q):
            return torch.sigmoid(q) * max(q.shape)

        assert check(mode, native, torch.ones(4)) is None
        [call] = mode.cache.table(
            native.dispatch_compile_native, native.dispatch_compile_native.impl, mode.config
        ).calls
        assert "surroundings_hold" not in (call.__doc__ or "")


count = 0


class TestWhatIsDone:
    """It is not in the graph, so that such functions are left alone."""

    def test_globals_that_are_set(self, mode):
        @dc.native
        def native(q):
            global count
            count += 1
            return q + 1

        for _ in range(2):
            with mode:
                native(torch.ones(4))
        assert count == 2
        assert mode.trace.events[-1].reason == "the implementation sets global count"

    def test_closed_over_variables_that_are_set(self, mode):
        calls = 0

        @dc.native
        def native(q):
            nonlocal calls
            calls += 1
            return q + 1

        for _ in range(2):
            with mode:
                native(torch.ones(4))
        assert calls == 2
        assert mode.trace.events[-1].reason == "the implementation sets closed-over calls"

    def test_attributes_of_classes_that_are_set(self, mode, helpers):
        @dc.native
        def native(q):
            helpers.Settings.limit += 1
            return q + 1

        for _ in range(2):
            with mode:
                native(torch.ones(4))
        assert helpers.Settings.limit == 3.0
        assert mode.trace.events[-1].reason == "the implementation changes helpers.Settings.limit"

    def test_results_that_are_remembered(self, mode, helpers):
        @dc.native
        def native(q):
            return q + helpers.remembered(4)

        for _ in range(2):
            with mode:
                assert_same(native(torch.ones(4)), torch.arange(4) + 1.0)
        assert type(helpers.remembered(4)) is torch.Tensor
        assert mode.trace.events[0].reason == "the implementation changes KNOWN"

    def test_results_that_functools_remembers(self, mode, helpers):
        @dc.native
        def native(q):
            return q + helpers.cached(4)

        with mode:
            assert_same(native(torch.ones(4)), torch.arange(4) + 1.0)
        assert mode.trace.events[0].action == "compiled"
        assert type(helpers.cached(4)) is torch.Tensor

    def test_what_the_collector_calls(self, mode):
        counts = Counter()

        def count(phase, _):
            counts[phase] += time.perf_counter() > 0
            random.random()

        @dc.native
        def native(q):
            loops = [[] for _ in range(3000)]  # more than what starts a collection
            return q + len(loops)

        gc.callbacks.append(count)
        try:
            assert check(mode, native, torch.ones(4)) is None
        finally:
            gc.callbacks.remove(count)
        assert counts["start"]
        assert gc.isenabled()

    @pytest.mark.parametrize(
        ("effect", "what"),
        [
            (lambda: print("printed"), "calls print"),
            (time.perf_counter, "calls perf_counter"),
            (random.random, "calls Random.random"),
            (lambda: os.environ.get("HOME"), "calls os."),
            (lambda: type(pytest), "asks for the type()"),
        ],
        ids=["print", "time", "random", "environment", "type"],
    )
    def test_what_is_no_computation(self, mode, capsys, effect, what):
        @dc.native
        def native(q):
            effect()
            return q + 1

        for _ in range(2):
            with mode:
                native(torch.ones(4))
        assert what in mode.trace.events[-1].reason
        assert capsys.readouterr().out.count("printed") == (2 if "print" in what else 0)

    @pytest.mark.parametrize(
        "change",
        [
            lambda q: q.resize_(2),
            lambda q: q.t_(),
            lambda q: setattr(q, "data", torch.zeros(4, 3)),
            lambda q: setattr(q, "note", 1),
        ],
        ids=["resize_", "t_", "data", "attribute"],
    )
    def test_arguments_that_become_other_tensors(self, mode, change):
        @dc.native
        def native(q):
            change(q)
            return torch.zeros(2) + q.sum()

        for _ in range(2):
            q, expected = torch.ones(4, 3), torch.ones(4, 3)
            change(expected)
            with mode:
                native(q)
            assert (q.shape, q.stride(), vars(q)) == (expected.shape, expected.stride(), vars(expected))
            assert_same(q.clone(), expected.clone())


def test_a_profiler_goes_on(mode):
    seen = []

    def profile(frame, event, arg):
        seen.append(event)

    @dc.native
    def native(q):
        return q + 1

    sys.setprofile(profile)
    try:
        with mode:
            native(torch.ones(4))
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert seen


def test_functions_of_functools_are_guarded(mode):
    @functools.cache
    def factor():
        return 2.0

    @dc.native
    def native(q):
        return q * factor()

    assert check(mode, native, torch.ones(4)) is None


def test_what_torch_calls_in_libraries_that_it_needs():
    """It reads annotations of its own, which lands in typing_extensions where typing remembers nothing."""

    @dc.native
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with dc.DispatchCompileMode(config=EAGER, trace=True) as mode:
        for width in range(2, 6):
            for clean in typing._cleanups:
                clean()
            doubled(torch.ones(4, width))
    assert {event.action for event in mode.trace.events} == {"compiled"}
