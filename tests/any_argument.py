"""Strategies for calls with arguments of every kind, under every state of the thread, in sequences.

A recipe says how to make a tensor, and a call is made of recipes: so it can be made anew for every run, and the runs
share nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from any_implementation import CONFIG_PROVIDERS, INT32_MAX, Subject, forget_tables
from hypothesis import strategies as st
from observation import Observation, observe
from support import outcome
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.types import Number
from torch.utils._python_dispatch import TorchDispatchMode

import dispatch_compile as dc

# ---- Tensors

TOKENS = -1  # in a recipe's shape: as many as the call has


class Tagged(Tensor):
    """A subclass that overrides nothing."""


class Overriding(Tensor):
    """A subclass with a ``__torch_function__``."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs)


class Wrapping(Tensor):
    """A subclass with a ``__torch_dispatch__``: a tensor around a tensor."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapping:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.wrapped = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def inner(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [inner(item) for item in value]
            return value.wrapped if isinstance(value, Wrapping) else value

        result = func(*map(inner, args), **{name: inner(value) for name, value in (kwargs or {}).items()})
        return cls(result) if isinstance(result, Tensor) else result


class Weight(nn.Parameter):
    """As engines derive theirs, to carry attributes."""


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _requiring_grad(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_(_differentiable(tensor))


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda tensor: tensor,
    "inference": lambda tensor: tensor,
    "parameter": lambda tensor: nn.Parameter(tensor, requires_grad=False),
    "weight": lambda tensor: Weight(tensor, requires_grad=False),
    "parameter that requires grad": lambda tensor: nn.Parameter(tensor, requires_grad=_differentiable(tensor)),
    "requires grad": _requiring_grad,
    "computed from what requires grad": lambda tensor: _requiring_grad(tensor).view_as(tensor),
    "conjugate": lambda tensor: tensor.conj(),
    "negative": lambda tensor: tensor if tensor.dtype is torch.bool else torch._neg_view(tensor),
    "zero": lambda tensor: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype),
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse() if tensor.dim() and tensor.dtype is torch.float32 else tensor,
    "tagged": lambda tensor: tensor.as_subclass(Tagged),
    "overriding": lambda tensor: tensor.as_subclass(Overriding),
    "wrapping": Wrapping,
}

# The strides of a shape, in elements, and the gaps that they leave; the first dimension is the tokens'.
Strides = Callable[[Sequence[int]], list[int]]


def _dense(shape: Sequence[int], order: Sequence[int], gap: int = 0, step: int = 1) -> list[int]:
    """Strides with the dimensions laid out in ``order``, outermost first: ``step`` between neighbours of the
    innermost, and ``gap`` elements left out after each run of it."""
    strides, span = [0] * len(shape), step
    for position, dim in enumerate(reversed(order)):
        strides[dim] = span
        span *= max(1, shape[dim])
        if position == 0:
            span += gap
    return strides


LAYOUTS: dict[str, Strides] = {
    "contiguous": lambda shape: _dense(shape, range(len(shape))),
    "rows with gaps": lambda shape: _dense(shape, range(len(shape)), gap=3),
    "every other element": lambda shape: _dense(shape, range(len(shape)), step=2),
    "tokens innermost": lambda shape: _dense(shape, range(len(shape))[::-1]),
    "tokens innermost, with gaps": lambda shape: _dense(shape, range(len(shape))[::-1], gap=3),
    "last dimensions swapped": lambda shape: _dense(shape, [*range(len(shape))[:-2], *range(len(shape))[-2:][::-1]]),
    "channels last": lambda shape: _dense(
        shape, [0, *range(2, len(shape)), 1] if len(shape) > 1 else range(len(shape))
    ),
    "tokens expanded": lambda shape: [0, *_dense(shape[1:], range(len(shape) - 1))] if shape else [],
    "all expanded": lambda shape: [0] * len(shape),
    "overlapping": lambda shape: [1] * len(shape),
}

FILLS = {
    "small numbers": [-1.5, 0.5, 2.5, -0.5, 1.5, 3.5, -2.5],
    "special numbers": [math.nan, -0.0, math.inf, 0.0, -math.inf, 1.0, 1e30],
    "zeros": [0.0],
}


@dataclass(frozen=True)
class TensorRecipe:
    """How to make a tensor.

    Attributes:
        shape: with :data:`TOKENS` for the call's number of tokens.
        offset: where in its memory it starts, in elements.
        alias: of another tensor of the call: ``"same"`` for that very object, ``"view"`` for another tensor on its
            memory, ``"overlapping view"`` for one that starts a token later and is the shorter for it; else None.
        of: which other tensor: the first, the second, ... (as far as there are any).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    kind: str = "plain"
    fill: str = "small numbers"
    offset: int = 0
    alias: str | None = None
    of: int = 0


@dataclass
class Built:
    """The arguments of one run.

    Attributes:
        tensors: all that are tensors, in order.
        memory: what they are views of.
    """

    tokens: int
    tensors: list[Tensor] = field(default_factory=list)
    memory: list[Tensor] = field(default_factory=list)

    def of(self, value: Any) -> Any:
        """A call's argument, made of a recipe if it is one, or of several."""
        if isinstance(value, list):
            return [self.of(item) for item in value]
        if not isinstance(value, TensorRecipe):
            return value
        tensor = self._aliasing(value) if value.alias is not None and self.tensors else self._fresh(value)
        self.tensors.append(tensor)
        return tensor

    def _aliasing(self, recipe: TensorRecipe) -> Tensor:
        other = self.tensors[recipe.of % len(self.tensors)]
        if recipe.alias == "same" or other.layout is not torch.strided:
            return other
        if recipe.alias == "view" or not other.dim() or not other.shape[0]:
            return other.view_as(other)
        return other[1:]

    def _fresh(self, recipe: TensorRecipe) -> Tensor:
        with torch.inference_mode(recipe.kind == "inference"):
            shape = [self.tokens if size == TOKENS else size for size in recipe.shape]
            strides = LAYOUTS[recipe.layout](shape)
            span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size)
            numbers = FILLS[recipe.fill]
            base = torch.tensor([numbers[i % len(numbers)] for i in range(recipe.offset + span)], dtype=torch.float64)
            if not (recipe.dtype.is_floating_point or recipe.dtype.is_complex):
                base = base.nan_to_num(3.0, 100.0, 0.0).clamp(0, 100)
            base = base.to(recipe.dtype)
            self.memory.append(base)
            return KINDS[recipe.kind](base.as_strided(shape, strides, recipe.offset))


# ---- The state of the thread


@contextmanager
def _set_to(value: Any, get: Callable[[], Any], set_: Callable[[Any], Any]) -> Iterator[None]:
    before = get()
    set_(value)
    try:
        yield
    finally:
        set_(before)


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to half": lambda: torch.autocast("cpu", dtype=torch.float16),
    "default dtype": lambda: _set_to(torch.float64, torch.get_default_dtype, torch.set_default_dtype),
    "default device": lambda: torch.device("meta"),
    "deterministic": lambda: _set_to(
        True, torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
    ),
    "matmul precision high": lambda: _set_to(
        "high", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    ),
    "matmul precision medium": lambda: _set_to(
        "medium", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    ),
    "three threads": lambda: _set_to(3, torch.get_num_threads, torch.set_num_threads),
    "forward AD": forward_ad.dual_level,
    "another dispatch mode": _Watching,
    "without torch functions of subclasses": torch._C.DisableTorchFunctionSubclass,
}

# ---- Calls


@dataclass(frozen=True)
class Call:
    """A call of an op.

    Attributes:
        arguments: by parameter; those left out have defaults.
        states: names of :data:`STATES`.
    """

    subject: Subject
    tokens: int
    arguments: Mapping[str, Any]
    states: frozenset[str] = frozenset()

    def run(self, mode: dc.DispatchCompileMode | None) -> Observation:
        """Make the arguments and the call, in a mode or without, and look at what it came to."""
        built = Built(self.tokens)
        given = {name: built.of(value) for name, value in self.arguments.items()}
        args = [value for name, value in given.items() if name not in self.subject.keyword_only]
        kwargs = {name: value for name, value in given.items() if name in self.subject.keyword_only}
        forget_tables()
        torch.default_generator.manual_seed(5)
        with warnings.catch_warnings(), ExitStack() as entered:
            warnings.filterwarnings("ignore", message=".*it runs eagerly", category=dc.DispatchCompileWarning)
            for name in sorted(self.states):
                entered.enter_context(STATES[name]())
            if mode is not None:
                entered.enter_context(mode)
            result = outcome(self.subject.overload, *args, **kwargs)
        return observe(result, {f"tensor {i}": tensor for i, tensor in enumerate(built.tensors)}, built.memory)


@dataclass(frozen=True)
class Program:
    """Calls to make one after the other in one mode with a cache of its own.

    Attributes:
        backend: ``"eager"`` or another registered backend, or :func:`assumes_32_bit_indices`.
        traced: whether the mode traces, which makes calls take another way.
    """

    calls: list[Call]
    backend: Any = "eager"
    on_failure: str = "native"
    traced: bool = False

    def mode(self) -> dc.DispatchCompileMode:
        """A new mode to make the calls in."""
        config = dc.CompileConfig(backend=self.backend, on_failure=self.on_failure, providers=CONFIG_PROVIDERS)
        return dc.DispatchCompileMode(config=config, trace=self.traced)


def assumes_32_bit_indices(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A backend that, like Inductor, asks whether tensors have few enough elements for 32-bit indices, and makes code
    that is wrong for more if they do."""
    few = all(bool(fake.numel() <= INT32_MAX) for fake in inputs if isinstance(fake, Tensor))

    def run(*args: Any) -> Any:
        results = graph(*args)
        if few and any(arg.numel() > INT32_MAX for arg in args if isinstance(arg, Tensor)):
            return [torch.zeros_like(result) for result in results]
        return results

    return run


# ---- Strategies

DTYPES = [
    *[torch.float32] * 4,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
]
EQUAL_SCALARS = [[1, True, 1.0, 1 + 0j], [0, False, 0.0, -0.0, 0j], [2, 2.0], [math.nan], [math.inf], [-math.inf]]
SCALARS = [scalar for equal in EQUAL_SCALARS for scalar in equal] + [0.5, -3, 2**40, 1j]
FLOATS = [scalar for scalar in SCALARS if isinstance(scalar, float)]

some_tokens = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 13, 16])
many_tokens = st.sampled_from([2, 3, INT32_MAX, INT32_MAX + 1, INT32_MAX + 2, 2**32 + 1, 2**40])
sizes = st.sampled_from([0, 1, 2, 2, 3, 3, 4, 4, 7, 8])
groups = st.just((128,))  # what quantization by groups takes
rests = st.one_of(st.just((4,)), st.just((4,)), st.lists(sizes, max_size=3).map(tuple), groups)
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(["contiguous"] * 8 + list(LAYOUTS))
fills = st.sampled_from(["small numbers", "small numbers", *FILLS])
offsets = st.sampled_from([0, 0, 0, 1, 3])
aliases = st.sampled_from([None] * 6 + ["same", "view", "overlapping view"])
# Where both watch a call that returns its argument, torch raises an internal error, with or without a mode of ours, and
# leaves dispatch keys of the thread excluded: calls after it crash.
_CRASHES_TORCH = {"forward AD", "another dispatch mode"}
states = st.frozensets(st.sampled_from(list(STATES)), max_size=2).filter(lambda names: not names >= _CRASHES_TORCH)
usual_states = st.one_of(*[st.just(frozenset())] * 3, states)


WORDS = {"how": ["cumulative", "sorted", "softmax", "median"], "approximate": ["none", "tanh", "Tanh"]}


def _scalars(name: str, annotation: Any) -> st.SearchStrategy[Any] | None:
    return {
        Number: st.sampled_from(SCALARS),
        float: st.sampled_from([*FLOATS, 1e-6, 1]),
        int: st.integers(-2, 5),
        bool: st.booleans(),
        str: st.sampled_from(WORDS.get(name, [""])),
        torch.dtype: dtypes,
        torch.dtype | None: st.one_of(st.none(), dtypes),
        list[int] | None: st.sampled_from([None, [], [0], [-1], [0, 1], [1, 0], [0, 0]]),
    }.get(annotation)


@dataclass(frozen=True)
class Common:
    """What tensors of a call tend to share."""

    rest: tuple[int, ...]
    dtype: torch.dtype


def _kinds(name: str, plain: int) -> st.SearchStrategy[str]:
    """Kinds for an argument. Beside others, eager may take memory that nobody wrote for a meta tensor's."""
    return st.sampled_from(["plain"] * plain + [kind for kind in KINDS if kind != "meta" or name == "x"])


@st.composite
def _tensors(draw: Any, common: Common, name: str, any_size: bool) -> TensorRecipe:
    if any_size:
        recipe = TensorRecipe((TOKENS, 4), layout=draw(st.sampled_from(["tokens expanded", "all expanded"])))
        return replace(recipe, dtype=common.dtype, fill="small numbers")
    usual = (TOKENS, *common.rest) if name.startswith("x") else common.rest[-1:]
    others = [usual, common.rest, (), (1,), (TOKENS, 1), (3, 4), (TOKENS, 2, 2, 3)]
    return TensorRecipe(
        shape=draw(st.sampled_from([usual] * 12 + others)),
        dtype=draw(st.one_of(st.just(common.dtype), st.just(common.dtype), dtypes)),
        layout=draw(layouts),
        kind=draw(_kinds(name, plain=30)),
        fill=draw(fills),
        offset=draw(offsets),
        alias=draw(aliases),
        of=draw(st.integers(0, 2)),
    )


@st.composite
def _arguments(draw: Any, subject: Subject, name: str, common: Common) -> Any:
    annotation = subject.parameters[name]
    scalars = _scalars(name, annotation)
    if scalars is not None:
        return draw(scalars)
    tensors = _tensors(common, name, subject.any_size)
    if name == "indices":
        integers = st.sampled_from([torch.int64, torch.int64, torch.int32, torch.uint8, torch.bool])
        return replace(draw(tensors), shape=(3,), dtype=draw(integers))
    return draw(
        {
            Tensor: tensors,
            Tensor | None: st.one_of(st.none(), tensors, tensors),
            list[Tensor]: st.lists(tensors, max_size=3),
            list[Tensor | None]: st.lists(st.one_of(st.none(), tensors), max_size=3),
        }[annotation]
    )


@st.composite
def _calls(draw: Any, subject: Subject, common: Common) -> Call:
    arguments = {name: draw(_arguments(subject, name, common)) for name in subject.parameters}
    return Call(subject, draw(_tokens(subject)), arguments, draw(usual_states))


def _tokens(subject: Subject) -> st.SearchStrategy[int]:
    return many_tokens if subject.any_size else some_tokens


@st.composite
def _neighbours(draw: Any, call: Call, common: Common) -> Call:
    """A call that differs in one thing: such calls are what guards have to tell apart."""
    changed = draw(st.sampled_from(["tokens", "tokens", "states", *call.subject.parameters]))
    if changed == "tokens":
        return replace(call, tokens=draw(_but(call.tokens, _tokens(call.subject))))
    if changed == "states":
        return replace(call, states=draw(_but(call.states, states)))
    value = draw(_neighbouring_arguments(call, changed, common))
    return replace(call, arguments={**call.arguments, changed: value})


def _but(value: Any, strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return strategy.filter(lambda other: repr(other) != repr(value))


@st.composite
def _neighbouring_arguments(draw: Any, call: Call, name: str, common: Common) -> Any:
    value, fresh = call.arguments[name], _arguments(call.subject, name, common)
    if isinstance(value, TensorRecipe) and not call.subject.any_size:
        aspects = {
            "dtype": dtypes,
            "layout": layouts,
            "kind": _kinds(name, plain=1),
            "fill": fills,
            "offset": offsets,
            "alias": aliases,
            "shape": st.sampled_from([(TOKENS, *common.rest), (TOKENS, *common.rest, 1), (TOKENS, 3), common.rest]),
        }
        aspect = draw(st.sampled_from(["layout", "layout", "kind", *aspects]))
        return replace(value, **{aspect: draw(_but(getattr(value, aspect), aspects[aspect]))})
    if call.subject.parameters[name] is Number:
        equal = [other for others in EQUAL_SCALARS for other in others if value in others]
        return draw(_but(value, st.sampled_from(equal)) if len(equal) > 1 else fresh)
    return draw(fresh)


@st.composite
def programs(draw: Any, subject: Subject, others: Sequence[Subject]) -> Program:
    """Few calls of a subject that differ in little, and one of another now and then, in any order and more than once:
    so that they meet what the others left in the cache."""
    common = Common(draw(rests), draw(dtypes))
    different = [draw(_calls(subject, common))]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        different.append(draw(_neighbours(draw(st.sampled_from(different)), common)))
    if draw(st.integers(0, 9)) == 9:
        different.append(draw(_calls(draw(st.sampled_from(others)), common)))
    backends = ["eager"] * 19 + ["aot_eager"] if not subject.any_size else ["eager", assumes_32_bit_indices]
    return Program(
        different + draw(st.lists(st.sampled_from(different), min_size=1, max_size=4)),
        backend=draw(st.sampled_from(backends)),
        on_failure=draw(st.sampled_from(["native", "native", "raise"])),
        traced=draw(st.integers(0, 19)) == 19,
    )


@st.composite
def calls_of_few_specializations(draw: Any, subjects: Mapping[str, Subject]) -> Call:
    """A call out of a few, but for what compiled code leaves dynamic, or steps aside for."""
    name, tokens, arguments = draw(st.sampled_from(_FEW))
    varied = {name: draw(_variations(value)) for name, value in arguments.items()}
    state = draw(st.sampled_from([frozenset()] * 12 + [frozenset({"autocast"}), frozenset({"forward AD"})]))
    return Call(subjects[name], draw(st.sampled_from(tokens)), varied, state)


@st.composite
def _variations(draw: Any, value: Any) -> Any:
    if not isinstance(value, TensorRecipe):
        return value
    return replace(
        value,
        kind=draw(st.sampled_from(["plain"] * 20 + ["parameter", "weight", "requires grad", "negative", "tagged"])),
        fill=draw(fills),
        offset=draw(offsets),
        alias=draw(st.sampled_from([None, None, "same", "view"])),
    )


_FEW_TOKENS, _HUGE = (0, 2, 3, 5, 8, 13), (3, INT32_MAX // 4, INT32_MAX + 2)
_F32, _BF16 = TensorRecipe((TOKENS, 8)), TensorRecipe((TOKENS, 8), torch.bfloat16)
_FEW: list[tuple[str, Sequence[int], dict[str, Any]]] = [
    ("arithmetic", _FEW_TOKENS, {"x": _F32, "x_other": _F32, "by": -0.0}),
    ("branches_on_the_tokens", _FEW_TOKENS, {"x": _F32, "more_than": 3}),
    ("reads_the_strides", _FEW_TOKENS, {"x": replace(_F32, layout="tokens innermost")}),
    ("makes_constants", _FEW_TOKENS, {"x": _F32, "flag": True}),
    ("looks_up", _FEW_TOKENS, {"x": _F32, "indices": TensorRecipe((3,), torch.int64)}),
    ("changes_an_argument", _FEW_TOKENS, {"x": _F32, "by": 2.0, "flag": True}),
    ("returns_a_view", _FEW_TOKENS, {"x": _F32, "how": "sorted"}),
    ("takes_the_last_token", _HUGE, {"x": replace(_F32, shape=(TOKENS, 4), layout="tokens expanded")}),
    ("dispatch_compile.silu_and_mul.default", (1,), {"x": _F32}),
    ("dispatch_compile.quant_fp8_per_token.default", _FEW_TOKENS, {"x": _BF16}),
]
