"""The calls that ``passthrough`` measures, and the modes in which they are made."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from dispatch_compile import DispatchCompileMode
from dispatch_compile._specialize.guards import MISS, GuardedCall
from dispatch_compile._torch.dispatch import OpOverload, TorchDispatchMode
from dispatch_compile.demo import ir_ops, moe

from .cases import CASES, DTYPES, Case, Inputs, Sizes
from .peers import OURS, Arguments, Ours, Peer
from .proof import check_compiled
from .results import counted

NO_MODE, PLAIN = "no mode", "plain mode"
AGAINST_NO_MODE = ((OURS, NO_MODE), (PLAIN, NO_MODE))
AGAINST_PLAIN = ((OURS, PLAIN),)

NAMESPACE = "dispatch_compile_passthrough"
BATCH, BATCH_OF_BODIES = 200, 2  # long for the clock, short beside what else the machine does

# Small, so that as much of the time as possible is the dispatcher's.
MATRIX = (4, 4)
TOKENS, EXPERTS, HIDDEN, INTERMEDIATE = (1, 8, 64), 16, 128, 128
INTERCEPTED, INTERCEPTED_SIZE = ("rms_norm", "silu_and_mul"), (4, 1024)


class PlainMode(TorchDispatchMode):
    """A dispatch mode as one writes it, without what it would be written for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without annotations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Arguments = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class LookUpMode(TorchDispatchMode):
    """A plain dispatch mode that runs guarded code for the ops that it finds in a table."""

    # Without this, torch wraps the method below to keep Dynamo out, which makes it dearer.
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self, guarded_calls: Mapping[OpOverload, GuardedCall]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._guarded_calls = guarded_calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Arguments = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        call = self._guarded_calls.get(func)
        if call is not None:
            result = call(args, kwargs)
            if result is not MISS:
                return result
        return func(*args, **kwargs)


class Comparison(NamedTuple):
    """Calls that are each made in the same ways.

    Attributes:
        ratios: the pairs of ways whose times are compared.
        batch: how many calls are timed at once.
        peers: the ways, by what is called.
    """

    title: str
    ratios: Sequence[tuple[str, str]]
    batch: int
    peers: Mapping[str, Sequence[Peer]]


@contextmanager
def comparisons(device: str) -> Iterator[list[Comparison]]:
    """All that is compared; inside, the ops that it needs exist."""
    with _foreign_op() as foreign:
        yield [_single_ops(device, foreign), _bodies(device), _entering(), _intercepted(device)]


@contextmanager
def _foreign_op() -> Iterator[OpOverload]:
    """An op ``(Tensor x) -> Tensor`` of another library: a Python function straight behind the dispatcher."""
    library = Library(NAMESPACE, "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x + x, "CompositeExplicitAutograd")
    try:
        yield getattr(torch.ops, NAMESPACE).twice.default
    finally:
        library._destroy()


def _in_all_modes(call: Callable[..., Any], *arguments: Any) -> list[Peer]:
    return [
        Peer(NO_MODE, call, [arguments]),
        Peer(OURS, call, [arguments], DispatchCompileMode()),
        Peer(PLAIN, call, [arguments], PlainMode()),
    ]


def _single_ops(device: str, foreign: OpOverload) -> Comparison:
    x, y = torch.randn(2, *MATRIX, device=device)
    calls: dict[str, tuple[Any, ...]] = {
        "add": (torch.add, x, y),
        "view": (Tensor.view, x, x.numel()),
        "mm": (torch.mm, x, y),
        "index": (operator.getitem, x, torch.arange(len(x), device=device)),
        "empty": (partial(torch.empty, device=device), MATRIX),
        "cat": (torch.cat, (x, y)),
        "copy_": (Tensor.copy_, x, y),
        "a custom op": (foreign, x),
    }
    peers = {name: _in_all_modes(*call) for name, call in calls.items()}
    return Comparison("An op that is not caught", AGAINST_NO_MODE, BATCH, peers)


def _bodies(device: str) -> Comparison:
    """The body of the demo's MoE, called as a function: a plain mode outside of the op would see the op alone."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    normal = partial(torch.randn, device=device, dtype=dtype)
    weights = normal(EXPERTS, HIDDEN), normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN), normal(EXPERTS, HIDDEN, INTERMEDIATE)
    peers = {
        counted(tokens, "token"): _in_all_modes(moe.fused_moe, normal(tokens, HIDDEN), *weights, moe.TOP_K, ir_ops.ATEN)
        for tokens in TOKENS
    }
    return Comparison("The body of a fused MoE, its IR ops taken out", AGAINST_NO_MODE, BATCH_OF_BODIES, peers)


def _entering() -> Comparison:
    def enter_and_leave(mode: AbstractContextManager[Any]) -> None:
        with mode:
            pass

    peers = [
        Peer(way, enter_and_leave, [(mode,)]) for way, mode in ((OURS, DispatchCompileMode()), (PLAIN, PlainMode()))
    ]
    return Comparison("A mode itself", AGAINST_PLAIN, BATCH, {"enter and leave": peers})


def _intercepted(device: str) -> Comparison:
    sizes = Sizes(*INTERCEPTED_SIZE, DTYPES["bf16"], device)
    peers = {name: _to_the_same_code(CASES[name], CASES[name].arguments(Inputs(sizes))) for name in INTERCEPTED}
    return Comparison("A call that is caught, and the same code run by a plain mode", AGAINST_PLAIN, BATCH, peers)


def _to_the_same_code(case: Case, arguments: Arguments) -> list[Peer]:
    ours, op = Ours(OURS, case.op), case.op.torch_op
    look_up = LookUpMode({op: ours.guarded(arguments).call})
    peers = [ours.peer([arguments]), Peer(PLAIN, op, [arguments], look_up, compiled=True)]
    for peer in peers:
        check_compiled(peer)
    return peers
