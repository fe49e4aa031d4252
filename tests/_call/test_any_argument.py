"""Right for any argument, or aside: whatever is called, with whatever, in whatever state of the thread, a mode changes
nothing that the caller can see.

``DISPATCH_COMPILE_EXAMPLES=50000 pytest tests/_call/test_any_argument.py`` tries that many sequences of calls, other
ones every time; without it they are some 2,000, the same every time.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from any_argument import TOKENS, Call, Program, TensorRecipe, calls_of_few_specializations, programs
from any_implementation import COMPILED, NAMES, NEVER_COMPILED, Subject, forget_tables, subjects
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from observation import differences
from support import EAGER_OR_NATIVE

import dispatch_compile as dc
from dispatch_compile._compile import capture as _capture
from dispatch_compile._specialize import guards, key
from dispatch_compile._specialize.callee import full_name

# torch crashes at some of the calls under any mode on its stack.
pytestmark = [pytest.mark.long, pytest.mark.run_once]

ASKED_FOR = os.environ.get("DISPATCH_COMPILE_EXAMPLES")
EXAMPLES = int(ASKED_FOR or 2000)
CHEAP = {native.__name__ for native in [*COMPILED, *NEVER_COMPILED]}
SETTINGS = settings(
    deadline=None,
    derandomize=ASKED_FOR is None,
    print_blob=ASKED_FOR is not None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def ops() -> Iterator[Mapping[str, Subject]]:
    with subjects() as defined:
        keeps_the_hooks = dc.DispatchCompileMode()
        yield defined
        del keeps_the_hooks


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """Without torch's logs of every capture, and of every error in one, which pytest would keep."""
    monkeypatch.setattr(torch._logging._internal, "trace_log", logging.Logger("of nobody"))
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def became() -> Counter[str]:
    """What became of the calls of all examples."""
    return Counter()


def check(calls: Sequence[Call], mode: dc.DispatchCompileMode, rounded: Collection[torch.dtype] = ()) -> None:
    """Make the calls in the mode, and each in eager too."""
    for i, call in enumerate(calls):
        actual, expected = call.run(mode), call.run(None)
        if mode.config.on_failure == "raise" and isinstance(actual.error, dc.CompileError):
            continue
        found = differences(actual, expected, rounded)
        assert not found, "\n".join([f"call {i}, {call}:", *found])


def _examples_of(name: str) -> int:
    """Three times as many for the small implementations of ``any_implementation`` as for those that take long, and
    enough for each to be compiled for some."""
    shares = {other: 3 if other in CHEAP else 1 for other in NAMES}
    return max(30, -(-EXAMPLES * shares[name] // sum(shares.values())))


@pytest.mark.parametrize("name", NAMES)
def test_right_or_aside(name, ops, became):
    subject, own_hits = ops[name], 0

    @settings(SETTINGS, max_examples=_examples_of(name))
    @given(programs(subject, [ops[name] for name in NAMES]))
    def right_or_aside(program: Program) -> None:
        nonlocal own_hits
        mode = program.mode()
        check(program.calls, mode)
        stats = mode.cache.stats()
        became.update(examples=1, compiled=stats.hits, not_compiled=stats.fallbacks + stats.asides)
        own_hits += mode.cache.counters_of(full_name(subject.overload)).hits

    right_or_aside()
    for number in range(10):
        if own_hits or not subject.compiles:
            break
        seed(number)(right_or_aside)()  # all of so few examples may have stepped aside
    assert bool(own_hits) == subject.compiles


def test_many_of_the_calls_ran_compiled(became):
    if became["examples"] < EXAMPLES:
        pytest.skip("not all of the examples ran")
    assert became["compiled"] > 0.4 * (became["compiled"] + became["not_compiled"])


def test_through_inductor(ops):
    """Few specializations, for each takes seconds, in one cache that all examples share."""
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(on_failure="native"))
    rounded = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]

    @settings(SETTINGS, max_examples=max(300, EXAMPLES // 10))
    @given(st.lists(calls_of_few_specializations(ops), min_size=1, max_size=8))
    def right_or_aside(calls: list[Call]) -> None:
        check(calls, mode, rounded)

    right_or_aside()
    stats = mode.cache.stats()
    assert stats.hits > stats.fallbacks + stats.asides
    assert stats.compiles < 20


# ---- The examples find mistakes: each of these takes away something of what keeps calls from running wrong code, and
# names the op that shows it

Mistake = Callable[[pytest.MonkeyPatch], None]


def _replaced(where: Any, name: str, value: Any) -> Mistake:
    return lambda patch: patch.setattr(where, name, value)


def _key_without(aspect: str) -> Mistake:
    """Leave out one of what the key of a tensor consists of."""
    return _replaced(key, "values", lambda facts: tuple(fact.value for fact in facts if fact.aspect != aspect))


class _AlwaysTrue:
    def check(self, *_: object) -> bool:
        return True


MISTAKES: dict[str, tuple[str, Mistake]] = {
    "the key leaves out sizes": ("returns_sizes", _key_without(key.SHAPE)),
    "the key leaves out strides": ("reads_the_strides", _key_without(key.STRIDE)),
    "the guard leaves out tensors": (
        "reads_the_strides",
        _replaced(guards, "_tensor_guards", lambda tensors: _AlwaysTrue()),
    ),
    "the guard leaves out the global state": (
        "reads_the_state",
        _replaced(guards, "GlobalStateGuard", _AlwaysTrue),
    ),
    "the guard leaves out scalars": (
        "arithmetic",
        _replaced(key, "_constant_guard", lambda leaf, constant: ""),
    ),
    "the guard leaves out scalars' types and signs": (
        "arithmetic",
        _replaced(key, "_constant_guard", lambda leaf, constant: f"{leaf.source} == {leaf.value!r}"),
    ),
    "the guard leaves out what was assumed of the tokens": (
        "branches_on_the_tokens",
        _replaced(_capture.Captured, "guards", lambda captured: None),
    ),
    "the guard leaves out what was assumed of the number of elements": (
        "takes_the_last_token",
        _replaced(_capture.Captured, "guards", lambda captured: None),
    ),
    "writes are not looked for": (
        "changes_an_argument",
        _replaced(_capture, "_check_graph", lambda graph, parameters, arguments: ()),
    ),
    "random numbers are not looked for": (
        "draws_random_numbers",
        _replaced(_capture, "_check_graph", lambda graph, parameters, arguments: ()),
    ),
    "shared memory is not looked for": (
        "returns_a_view",
        _replaced(_capture, "_check_outputs", lambda outputs, inputs, arguments: None),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_finds(mistake, ops, monkeypatch):
    name, make = MISTAKES[mistake]
    make(monkeypatch)

    @settings(SETTINGS, max_examples=800, phases=[Phase.generate])
    @given(programs(ops[name], [ops[name]]))
    def right_or_aside(program: Program) -> None:
        check(program.calls, program.mode())

    with pytest.raises(AssertionError):
        right_or_aside()


# ---- What the package does not notice


@pytest.mark.xfail(strict=True, raises=AssertionError)
def test_an_implementation_that_remembers_tensors(ops):
    """A capture leaves a fake one for the next."""
    forget_tables()
    with dc.DispatchCompileMode(config=EAGER_OR_NATIVE):
        for tokens in (4, 1):
            ops["remembers_a_table"].overload(torch.ones(tokens, 4))


@pytest.mark.xfail(strict=True, raises=AssertionError)
def test_an_implementation_that_differentiates_under_another_dispatch_mode(ops):
    """Eager raises there, for torch keeps autograd out; code that was compiled elsewhere does not."""
    call = Call(ops["differentiates"], 4, {"x": TensorRecipe((TOKENS, 4))})
    program = Program([call, replace(call, states=frozenset({"another dispatch mode"}))])
    check(program.calls, program.mode())
