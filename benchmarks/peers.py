"""The ways to run an op that are compared. Each lives as long as an op is measured, so that it compiles as often as
it would in a server, and makes a :class:`Peer` for every number of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody gives it
from torch import Tensor
from torch._dynamo.utils import counters

from dispatch_compile import CompileConfig, DispatchCompileMode, IrOp
from dispatch_compile._cache.table import Guarded
from dispatch_compile._compile.specialization import Specialization
from dispatch_compile._specialize.guards import MISS
from dispatch_compile._torch.dispatch import OpOverload, QuietMode

from .cases import Case, bytes_moved
from .handwritten import HANDWRITTEN

EAGER = "eager"
TORCH_COMPILE = "torch.compile in a mode"
MARK_DYNAMIC = "mark_dynamic in a mode"
VLLM = "handwritten (vLLM)"
F_RMS_NORM = "F.rms_norm"
OURS = "ours"
APART = "ours, apart"
CODE_ALONE = "compiled code alone"
TUNED = "ours, tuned"
MULTI_KERNEL = "ours, multi-kernel"
TUNED_MULTI_KERNEL = "ours, tuned, multi-kernel"
COPY = "copy"

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Peer:
    """One way to run an op, for one number of tokens.

    Attributes:
        call: what is timed.
        rotation: arguments to call it with in turn; a list among them is emptied by the call.
        context: entered around the calls.
        compiled: whether it claims to run compiled code.
        comparable: whether its result is to be the op's.
    """

    name: str
    call: Callable[..., Any]
    rotation: Sequence[Arguments]
    context: AbstractContextManager[Any] = field(default_factory=nullcontext)
    compiled: bool = False
    comparable: bool = True

    def arguments(self, count: int) -> list[Arguments]:
        """The arguments of ``count`` calls."""
        return [
            tuple(argument.copy() if isinstance(argument, list) else argument for argument in arguments)
            for arguments in islice(cycle(self.rotation), count)
        ]


class Contender(ABC):
    """A way to run an op, for any number of tokens from ``fewest_tokens`` up."""

    def __init__(self, name: str, fewest_tokens: int = 0) -> None:
        self.name = name
        self.fewest_tokens = fewest_tokens

    @abstractmethod
    def peer(self, rotation: Sequence[Arguments]) -> Peer:
        """This way to make the calls of the op that have these arguments."""

    def compilations(self) -> int | None:
        """How many there were up to now; None if it does not compile."""
        return None


class Calling(Contender):
    """A function that takes the op's arguments: the op itself, or one that does the same."""

    def __init__(self, name: str, call: Callable[..., Any], own_arguments: bool = False) -> None:
        super().__init__(name)
        self._call = call
        self._own_arguments = own_arguments  # for a function that overwrites them

    def peer(self, rotation: Sequence[Arguments]) -> Peer:
        if self._own_arguments:
            rotation = [tuple(a.clone() if isinstance(a, Tensor) else a for a in args) for args in rotation]
        return Peer(self.name, self._call, rotation)


class Ours(Contender):
    """The op inside a ``DispatchCompileMode`` with this configuration."""

    def __init__(self, name: str, op: IrOp, config: CompileConfig | None = None, fewest_tokens: int = 0) -> None:
        super().__init__(name, fewest_tokens)
        self.op = op
        self.mode = DispatchCompileMode(ops=[op], config=config)

    def peer(self, rotation: Sequence[Arguments]) -> Peer:
        return Peer(self.name, self.op.torch_op, rotation, self.mode, compiled=True)

    def compilations(self) -> int | None:
        return self.mode.cache.stats().compiles

    def guarded(self, arguments: Arguments) -> Guarded:
        """What a call with these arguments runs once it is intercepted; compiled first, if need be."""
        with self.mode:
            self.op.torch_op(*arguments)
        table = self.mode.cache.table(self.op, self.op.impls["native"], self.mode.config)
        for entry in table.guarded:
            if isinstance(entry.known, Specialization) and entry.call(arguments, {}) is not MISS:
                return entry
        raise RuntimeError("nothing was compiled for these arguments")


class Apart(Contender):
    """The ops that a case is composed of, one after the other inside a ``DispatchCompileMode``."""

    def __init__(self, case: Case) -> None:
        super().__init__(APART)
        self._call = case.op.impls["native"].impl_fn
        self._mode = DispatchCompileMode(ops=case.parts)

    def peer(self, rotation: Sequence[Arguments]) -> Peer:
        return Peer(self.name, self._call, rotation, self._mode, compiled=True)

    def compilations(self) -> int | None:
        return self._mode.cache.stats().compiles


class CodeAlone(Contender):
    """The code that :class:`Ours` runs, called with its inputs made beforehand: nothing is intercepted or guarded."""

    def __init__(self, ours: Ours) -> None:
        super().__init__(CODE_ALONE)
        self._ours = ours

    def peer(self, rotation: Sequence[Arguments]) -> Peer:
        known: Any = self._ours.guarded(rotation[0]).known
        prepared = [_arguments_of_run(known.code.call, arguments) for arguments in rotation]
        return Peer(self.name, known.code.run, prepared, compiled=True)


def _arguments_of_run(call: str, arguments: Arguments) -> Arguments:
    """What the expression by which the guards run compiled code gives it."""
    given: list[Arguments] = []
    scope = {f"a{i}": argument for i, argument in enumerate(arguments)}
    eval(call, {"run": lambda *inputs: given.append(inputs)}, scope)
    return given[0]


class TorchCompileMode(QuietMode):
    """A plain dispatch mode that sends one op to a function."""

    def __init__(self, overload: OpOverload, function: Callable[..., Any]) -> None:
        super().__init__()
        self._overload = overload
        self._function = function

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Arguments = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is self._overload:
            return self._function(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class TorchCompileInMode(Contender):
    """The op inside a plain dispatch mode that calls ``torch.compile(native)``."""

    def __init__(self, name: str, op: IrOp, function: Callable[..., Any]) -> None:
        super().__init__(name)
        self._op = op
        self._mode = TorchCompileMode(op.torch_op, function)
        self._compilations = 0

    def peer(self, rotation: Sequence[Arguments]) -> Peer:
        before = counters["stats"]["unique_graphs"]
        with self._mode:
            self._op.torch_op(*rotation[0])
        self._compilations += counters["stats"]["unique_graphs"] - before
        return Peer(self.name, self._op.torch_op, rotation, self._mode, compiled=True)

    def compilations(self) -> int | None:
        return self._compilations


def all_sizes_dynamic(case: Case) -> Callable[..., Any]:
    """What vLLM does today: ``torch.compile(native, dynamic=True)``."""
    function: Callable[..., Any] = torch.compile(case.plain, dynamic=True)
    return function


def tokens_marked_dynamic(case: Case) -> Callable[..., Any]:
    """``torch.compile(native)`` with the token dimension of each activation marked at every call."""
    compiled = torch.compile(case.plain)
    activations = case.op.activation_indices
    mark_dynamic = torch._dynamo.mark_dynamic

    def marking(*args: Any) -> Any:
        for i in activations:
            if args[i].shape[0] > 1:  # at 0 and 1 torch specializes, and says so with an error if they are marked
                mark_dynamic(args[i], 0)
        return compiled(*args)

    return marking


class Copy(Contender):
    """A bare copy that moves as many bytes as the op must: what the memory's bandwidth allows."""

    def __init__(self, op: Callable[..., Any]) -> None:
        super().__init__(COPY)
        self._op = op

    def peer(self, rotation: Sequence[Arguments]) -> Peer:
        moved = bytes_moved(rotation[0], self._op(*rotation[0]))
        source = torch.zeros(max(1, moved // 2), dtype=torch.uint8, device=rotation[0][0].device)
        buffers = [(torch.empty_like(source), source.clone()) for _ in rotation]
        return Peer(self.name, Tensor.copy_, buffers, comparable=False)


def contenders(case: Case, eager: Callable[..., Any], device: str, with_vllm: bool) -> list[Contender]:
    """Every way to run a case's op on a device.

    Args:
        eager: the op, out of reach of the modes.
        with_vllm: whether vLLM's kernels are loaded.
    """
    op = case.op
    ours = Ours(OURS, op)
    found: list[Contender] = [
        Calling(EAGER, eager),
        TorchCompileInMode(TORCH_COMPILE, op, all_sizes_dynamic(case)),
        TorchCompileInMode(MARK_DYNAMIC, op, tokens_marked_dynamic(case)),
    ]
    if with_vllm and op.name in HANDWRITTEN:
        found.append(Calling(VLLM, HANDWRITTEN[op.name], own_arguments=True))
    if op.name == "rms_norm":
        found.append(Calling(F_RMS_NORM, _f_rms_norm))
    found.append(ours)
    if case.parts:
        found.append(Apart(case))
    found.append(CodeAlone(ours))
    if device == "cuda":
        # Tuning is for many tokens. For one it would compile once more, and gain nothing.
        tuned, multi_kernel = {"coordinate_descent_tuning": True}, {"triton.multi_kernel": 1}
        found.append(Ours(TUNED, op, CompileConfig(options=tuned), fewest_tokens=2))
        if case.reduces:
            both = {**tuned, **multi_kernel}
            found.append(Ours(MULTI_KERNEL, op, CompileConfig(options=multi_kernel), fewest_tokens=2))
            found.append(Ours(TUNED_MULTI_KERNEL, op, CompileConfig(options=both), fewest_tokens=2))
    return [*found, Copy(eager)]


def _f_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, epsilon)
