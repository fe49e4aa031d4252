"""Where the time of one intercepted call goes, and what the same function costs as a native: ``python -m
benchmarks breakdown``.

Parts of the call are timed on their own, in turns, and what a part adds to the one inside it is its share.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from dispatch_compile import DispatchCompileMode, native

from . import timing
from .arguments import DEVICES, available
from .cases import CASES, DTYPES, Inputs, Sizes, tensors
from .peers import CODE_ALONE, CodeAlone, Ours, Peer

NAMESPACE = "dispatch_compile_breakdown"
CALL, DISPATCHER, GUARDED, ALLOCATION = "call", "dispatcher", "guarded code", "allocation"
AS_NATIVE, NATIVE_OUTSIDE, EAGER = "as a native", "a native outside of a mode", "the function itself"


def main(argv: Sequence[str]) -> int:
    """Print the shares of one op's call.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks breakdown", description=__doc__)
    parser.add_argument("--op", choices=CASES, default="rms_norm")
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    given = parser.parse_args(argv)
    device = available(given.device, parser)
    torch.set_num_threads(1)
    with torch.inference_mode():
        sizes = Sizes(given.tokens, given.hidden, DTYPES["bf16"], device)
        print(text(shares(given.op, sizes)))
        print()
        print(text(as_native(given.op, sizes), total=False))
    return 0


def as_native(op_name: str, sizes: Sizes) -> dict[str, float]:
    """Host seconds of a call of an op, and of calls of its native implementation as a native."""
    case = CASES[op_name]
    arguments = case.arguments(Inputs(sizes))
    ours, function = Ours(CALL, case.op), case.op.impls["native"].impl_fn
    decorated = native(function)
    mode = DispatchCompileMode(ops=[decorated])
    peers = [
        ours.peer([arguments]),
        Peer(AS_NATIVE, decorated, [arguments], mode, compiled=True),
        Peer(NATIVE_OUTSIDE, decorated, [arguments]),
        Peer(EAGER, function, [arguments]),
    ]
    samples = timing.measure(peers, timing.timer(sizes.device), timing.ROUNDS, each_round=lambda: None)
    return {name: median(kinds[timing.HOST]) for name, kinds in samples.items()}


def shares(op_name: str, sizes: Sizes) -> dict[str, float]:
    """Host seconds of each part of a call of an op; together they are the call."""
    case = CASES[op_name]
    arguments = case.arguments(Inputs(sizes))
    ours = Ours(CALL, case.op)
    whole = ours.peer([arguments])
    with ours.mode:
        result = whole.call(*arguments)
    with _op_that_does_nothing(case.op.torch_op._schema, result) as nothing:
        peers = [
            whole,
            Peer(DISPATCHER, nothing, [arguments]),
            Peer(GUARDED, ours.guarded(arguments).call, [(arguments, {})]),
            CodeAlone(ours).peer([arguments]),
            Peer(ALLOCATION, _allocation(tensors(result)), [()]),
        ]
        samples = timing.measure(peers, timing.timer(sizes.device), timing.ROUNDS, each_round=lambda: None)
    times = {name: median(kinds[timing.HOST]) for name, kinds in samples.items()}
    return {
        "dispatcher, and entering the Python kernel": times[DISPATCHER],
        "mode, route and the op's own dispatch": times[CALL] - times[DISPATCHER] - times[GUARDED],
        "guard": times[GUARDED] - times[CODE_ALONE],
        "allocation of the results": times[ALLOCATION],
        "the rest of the generated code: launch, and on a CPU the kernel": times[CODE_ALONE] - times[ALLOCATION],
    }


def text(found: dict[str, float], *, total: bool = True) -> str:
    """Times as a table, in microseconds; shares with their sum."""
    rows = {**found, "together": sum(found.values())} if total else found
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {seconds * 1e6:6.2f} µs" for name, seconds in rows.items())


@contextmanager
def _op_that_does_nothing(schema: Any, result: Any) -> Any:
    """An op of that schema whose kernel, where ours is, returns what is at hand."""
    library = Library(NAMESPACE, "FRAGMENT")
    library.define(f"nothing({str(schema).partition('(')[2]}")
    library.impl("nothing", lambda keyset, *args, **kwargs: result, "BackendSelect", with_keyset=True)
    try:
        yield getattr(torch.ops, NAMESPACE).nothing.default
    finally:
        library._destroy()


def _allocation(results: list[Tensor]) -> Any:
    layouts = [(tuple(r.shape), r.stride(), r.dtype, r.device) for r in results]

    def allocate() -> None:
        for shape, stride, dtype, device in layouts:
            torch.empty_strided(shape, stride, dtype=dtype, device=device)

    return allocate
