"""A program for a fresh process, where no test has left modes or ops: what modes change in torch's dispatch tables.

It goes through the lives of several modes and prints, as JSON, in which ops which dispatch keys differ from before,
after each step. ``test_dispatch_table.py`` runs it.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "dispatch_compile_foreign"
# How the ops of another library are defined: at which dispatch keys each has a kernel.
KERNELS_OF_LIBRARY_OPS = {
    "cpu": ["CPU"],
    "explicit": ["CompositeExplicitAutograd"],
    "implicit": ["CompositeImplicitAutograd"],
    "autograd": ["CPU", "Autograd"],
    "selects_backend": ["CPU", "BackendSelect"],
    "undefined": [],
}
CUSTOM_OPS = ["custom", "custom_with_gradient"]


def tables() -> dict[str, str]:
    """The dispatch table of every op, and what was registered for it, a line for each dispatch key."""
    names = torch._C._dispatch_get_all_op_names()
    return {name: torch._C._dispatch_dump_table(name) + torch._C._dispatch_dump(name) for name in names}


def differing_keys(before: dict[str, str]) -> dict[str, list[str]]:
    """The ops whose tables differ from ``before``, each with the dispatch keys; ops that are new are not compared."""
    now = tables()
    return {
        name: sorted({line.partition(":")[0] for line in {*text.splitlines()} ^ {*now.get(name, "").splitlines()}})
        for name, text in before.items()
        if now.get(name) != text
    }


def define_foreign_ops() -> list[Any]:
    """One op for each way to define one; what is returned keeps them."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")

    def double(x: Tensor) -> Tensor:
        return x * 2

    for name, keys in KERNELS_OF_LIBRARY_OPS.items():
        library.define(f"{name}(Tensor x) -> Tensor")
        for key in keys:
            library.impl(name, double, key)

    custom = [
        torch.library.custom_op(f"{NAMESPACE}::{name}", double, mutates_args=(), schema="(Tensor x) -> Tensor")
        for name in CUSTOM_OPS
    ]
    custom[1].register_autograd(lambda ctx, gradient: gradient * 2)
    return [library, *custom]


def call_ops(dc: Any) -> None:
    x = torch.ones(2, 4)
    dc.ops.silu_and_mul(x)
    torch.ops.dispatch_compile_foreign.cpu(x)
    torch.ops.dispatch_compile_foreign.custom_with_gradient(x.requires_grad_()).sum().backward()


def lives_of_modes(dc: Any) -> Iterator[str]:
    """Stops after every step, and names it."""
    config = dc.CompileConfig(backend="eager")
    mode = dc.DispatchCompileMode(config=config)
    yield "a mode is made"
    with mode:
        yield "it is entered"
        call_ops(dc)
        assert mode.cache.stats().hits == 1
        yield "ops are called in it"
    yield "it is left"
    del mode
    yield "it is dropped"

    mode = dc.DispatchCompileMode(config=config, ops=[dc.ops.rms_norm])
    with mode:
        yield "a mode for one op is entered"
    del mode
    yield "the mode for one op is dropped"

    tracing = dc.DispatchCompileMode(config=config, trace=True)
    with tracing:
        yield "a tracing mode is entered"
        call_ops(dc)
        assert tracing.cache.stats().hits == 1
        yield "ops are called in the tracing mode"
        mode = dc.DispatchCompileMode(config=config)
        with mode:
            yield "another mode is entered inside"
    del tracing
    yield "the tracing mode is dropped"

    def reference(x: Tensor) -> Tensor:
        return x * 2

    handle = dc.register_native(f"{NAMESPACE}::explicit", reference)
    yield "a foreign op gets a reference implementation"
    handle.remove()
    yield "it loses it"
    del mode
    yield "the last mode is dropped"


def report() -> dict[str, Any]:
    # Both register ops, and are imported at the first call in a mode if not before.
    import torch._dynamo
    import torch._inductor.compile_fx

    foreign = define_foreign_ops()
    of_others = tables()

    import dispatch_compile

    changed_by_the_import = differing_keys(of_others)
    before, impls = tables(), set(torch.library._impls)
    differences = {}
    for step in lives_of_modes(dispatch_compile):
        gc.collect()
        differences[step] = differing_keys(before)
    del foreign
    return {
        "number of ops": len(of_others),
        "changed by the import": changed_by_the_import,
        "defined by the import": sorted(before.keys() - of_others.keys()),
        "after each step": differences,
        "defined by a mode": sorted(tables().keys() - before.keys()),
        "registered by a mode": sorted(torch.library._impls - impls),
    }


if __name__ == "__main__":
    print(json.dumps(report()))
