"""What is baked in is one record: keys, guards and what people read say the same of any two calls."""

from __future__ import annotations

import enum
import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dispatch_compile._specialize.arguments import Arguments, Learned, Parameters, Step, flatten
from dispatch_compile._specialize.difference import argument_components, components_of, difference, state_components
from dispatch_compile._specialize.guards import MISS, guarded
from dispatch_compile._specialize.key import facts_of, key_of, state_facts


@dataclass(frozen=True)
class TensorRecipe:
    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    kind: str = "plain"

    def make(self) -> Tensor:
        with torch.inference_mode(self.kind == "inference"):
            size = torch.Size(self.shape)
            strides = {
                "contiguous": torch.empty(size).stride(),
                "gaps": tuple(2 * step for step in torch.empty(size).stride()),
                "transposed": torch.empty(size[::-1]).stride()[::-1],
                "expanded": (0,) * len(size),
            }[self.layout]
            tensor = torch.zeros(200, dtype=self.dtype).as_strided(size, strides)
        return tensor.requires_grad_() if self.kind == "requires grad" else tensor


class Thing:
    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)


class Other(Thing):
    pass


class Choice(enum.Enum):
    ONE = 1
    TWO = 2


Pair = namedtuple("Pair", "first second")

CONSTANTS = [
    *(True, 1, 1.0, 1j, False, 0, 0.0, -0.0, complex(0.0, -0.0), 2, math.nan, math.inf, -math.inf),
    *(None, "", "1", "any int", torch.float16, torch.float32, torch.device("cpu"), torch.strided),
    *(Choice.ONE, Choice.TWO, int, float, len, abs, math.sqrt),
]


def made(recipe: Any) -> Any:
    """A value made anew, so that two calls share no tensor, list or object."""
    if isinstance(recipe, TensorRecipe):
        return recipe.make()
    if isinstance(recipe, Pair):
        return Pair(*map(made, recipe))
    if isinstance(recipe, (list, tuple)):
        return type(recipe)(map(made, recipe))
    if isinstance(recipe, dict):
        return type(recipe)((key, made(value)) for key, value in recipe.items())
    if isinstance(recipe, Thing):
        return type(recipe)(**{name: made(value) for name, value in vars(recipe).items()})
    return float(str(recipe)) if isinstance(recipe, float) else recipe


def _aspects(layouts: tuple[str, ...]) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "shape": st.sampled_from([(), (1,), (2,), (3,), (0, 3), (1, 3), (2, 3), (3, 3), (3, 1), (2, 3, 2)]),
        "layout": st.sampled_from(layouts),
        "dtype": st.sampled_from([torch.float32, torch.float32, torch.float64]),
        "kind": st.sampled_from(["plain", "plain", "requires grad", "inference"]),
    }


def recipes(layouts: tuple[str, ...], objects: bool) -> st.SearchStrategy[Any]:
    tensors = st.builds(TensorRecipe, **_aspects(layouts))
    simple = st.one_of(tensors, st.sampled_from(CONSTANTS))
    several = st.lists(simple, max_size=2)
    if not objects:  # what the dispatcher hands to an op
        return st.one_of(simple, simple, several)
    keys = st.sampled_from(["a", "b", 1])
    held = st.dictionaries(st.sampled_from(["eps", "unread"]), simple)
    things = st.builds(lambda kind, held: kind(**held), st.sampled_from([Thing, Other]), held)
    return st.one_of(
        *(simple, simple, several, several.map(tuple), st.lists(several, max_size=1), things),
        *(st.dictionaries(keys, simple, max_size=2), st.dictionaries(keys, simple, max_size=1).map(OrderedDict)),
        st.builds(Pair, simple, simple),
    )


@contextmanager
def _set_to(value: Any, get: Callable[[], Any], set_: Callable[[Any], Any]) -> Iterator[None]:
    before = get()
    set_(value)
    try:
        yield
    finally:
        set_(before)


def _precision(name: str) -> Callable[[], AbstractContextManager[None]]:
    return lambda: _set_to(name, torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "no grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "precision high": _precision("high"),
    "precision medium": _precision("medium"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": lambda: _set_to(
        True, torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
    ),
}
states = st.sampled_from([*["plain"] * 20, *STATES])

LAYOUTS = ("contiguous", "contiguous", "gaps", "transposed", "expanded")
# Of those a guard reads every stride. Dynamic ones are conditions that come with the code.
STATIC_STRIDES = ("contiguous", "contiguous", "gaps")


@dataclass(frozen=True)
class Reading:
    """How calls of ``(x, y)`` are read.

    Attributes:
        tokens: whether dimension 0 of ``x`` is dynamic.
        number: whether ``y`` is, if it is a number.
    """

    objects: bool = True
    tokens: bool = False
    number: bool = False

    def of(self, args: tuple[Any, ...]) -> Arguments:
        parameters = Parameters(("x", "y"), 2, frozenset("x" if self.tokens else ""), objects=self.objects)
        reads = frozenset((name, Step("eps")) for name in "xy")
        return flatten(parameters, args, {}, Learned(dynamic=frozenset("y" if self.number else ""), reads=reads))


@st.composite
def pairs(draw: Any) -> tuple[Reading, list[tuple[Any, str]]]:
    """Two calls, each with the state that it is made in; more often than not they differ in one thing at most."""
    reading = Reading(*draw(st.tuples(st.booleans(), st.booleans(), st.booleans())))
    layouts = STATIC_STRIDES if reading.tokens else LAYOUTS
    values = recipes(layouts, reading.objects)
    call = [draw(values), draw(values)]
    other = list(call)
    if draw(st.booleans()):
        i = draw(st.integers(0, 1))
        if isinstance(call[i], TensorRecipe):
            aspect, options = draw(st.sampled_from(sorted(_aspects(layouts).items(), key=lambda item: item[0])))
            other[i] = replace(call[i], **{aspect: draw(options)})
        else:
            other[i] = draw(values)
    state = draw(states)
    return reading, [(tuple(call), state), (tuple(other), draw(st.one_of(st.just(state), states)))]


def conditions(arguments: Arguments) -> str | None:
    """What the code for dynamic sizes asks for."""
    return " and ".join(f"2 <= {leaf.source}.size(0)" for leaf in arguments.tensors if leaf.dynamic) or None


@settings(max_examples=1500, deadline=None, derandomize=True, print_blob=False, suppress_health_check=list(HealthCheck))
@given(pairs())
@example((Reading(), [(([],), "plain"), (([[]],), "plain")]))
@example((Reading(), [(({"a": 1, "b": 1},), "plain"), (({"b": 1, "a": 1},), "plain")]))
@example((Reading(), [((Thing(eps=1),), "plain"), ((Thing(),), "plain")]))
@example((Reading(), [((Thing(eps=1),), "plain"), ((Other(eps=1),), "plain")]))
@example((Reading(number=True), [((None, 1), "plain"), ((None, 2), "plain")]))
@example((Reading(number=True), [((None, 1), "plain"), ((None, True), "plain")]))
@example((Reading(), [((TensorRecipe((2, 3)),), "plain"), ((TensorRecipe((3, 3)),), "plain")]))
@example((Reading(), [((TensorRecipe((3,)),), "no grad"), ((TensorRecipe((3,)),), "inference mode")]))
@example((Reading(), [((TensorRecipe((3,)),), "precision high"), ((TensorRecipe((3,)),), "precision medium")]))
@example((Reading(), [((TensorRecipe((3,), kind=kind),), "inference mode") for kind in ("plain", "inference")]))
def test_keys_guards_and_texts_tell_the_same_calls_apart(pair):
    reading, calls = pair
    (args, state), (other_args, other_state) = calls
    with STATES[state]():
        arguments = reading.of(tuple(map(made, args)))
        key, components = key_of(arguments), components_of(arguments)
        call = guarded(arguments, conditions(arguments), ["return True"], {}, of_function=False)
    with STATES[other_state]():
        given_args = tuple(map(made, other_args))
        other = reading.of(given_args)
        other_key, other_components = key_of(other), components_of(other)
        admits = call(given_args, {}) is not MISS
    assert admits == (key == other_key), call.__doc__
    assert (difference(components, [(other_components, "")]) == "") == (key == other_key)
    texts, other_texts = ([fact.text for fact in each.values()] for each in (components, other_components))
    assert ((list(components), texts) == (list(other_components), other_texts)) == (key == other_key)


def test_every_fact_is_told():
    """Those of tensors, constants and the state in explanations; those of groups where calls differ in them."""
    arguments = Reading().of(([torch.ones(2, 3), 1.0], Thing(eps=1)))
    told = {**argument_components(arguments), **state_components()}
    facts = [fact for leaf in arguments.leaves for fact in facts_of(leaf)] + list(state_facts())
    assert list(told.values()) == [fact.text for fact in facts]
    assert set(components_of(arguments)) - set(told) == {"x", "x's keys", "y", "y's keys"}


# ---- The nearest of several specializations is the one that differs in fewest facts


def strided(*shape_and_row: int, **options: Any) -> Tensor:
    *shape, row = shape_and_row
    return torch.zeros(4096, **options).as_strided(tuple(shape), (row, 1))


def inference(*shape: int) -> Tensor:
    with torch.inference_mode():
        return torch.ones(shape)


NEAREST: dict[str, tuple[list[Callable[[], Tensor]], str]] = {
    "stride": (
        [lambda: strided(4, 16, 64), lambda: strided(3, 8, 128), lambda: strided(4, 16, 128)],
        "x's stride is [128, 1], was [64, 1]",
    ),
    "stride that follows from another shape": (
        [lambda: strided(4, 16, 64), lambda: torch.ones(3, 8), lambda: torch.ones(4, 16)],
        "x's stride is [16, 1], was [64, 1]",
    ),
    "dtype": (
        [lambda: torch.ones(4, 16), lambda: torch.ones(3, 8).double(), lambda: torch.ones(4, 16).double()],
        "x is f64, was f32",
    ),
    "dtype and stride": (
        [lambda: strided(4, 16, 64), lambda: torch.ones(3, 8), lambda: strided(4, 16, 128).double()],
        "x is f64, was f32; x's stride is [16, 1], was [64, 1]",
    ),
    "device": (
        [lambda: torch.ones(4, 16), lambda: torch.ones(3, 8, device="meta"), lambda: torch.ones(4, 16, device="meta")],
        "x's device is meta, was cpu",
    ),
    "requires_grad": (
        [
            lambda: torch.ones(4, 16),
            lambda: torch.ones(3, 8, requires_grad=True),
            lambda: torch.ones(4, 16, requires_grad=True),
        ],
        "x's requires_grad is True, was False",
    ),
    "inference tensor": (
        [lambda: torch.ones(4, 16), lambda: inference(3, 8), lambda: inference(4, 16)],
        "x's is_inference() is True, was False",
    ),
}


@pytest.mark.parametrize("aspect", NEAREST)
def test_the_nearest_differs_in_fewest_facts(aspect):
    makes, expected = NEAREST[aspect]
    *others, new = (components_of(Reading(tokens=True).of((make(),))) for make in makes)
    assert difference(new, [(other, "") for other in others]) == expected
