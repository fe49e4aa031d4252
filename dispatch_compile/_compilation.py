"""From an implementation and a call's arguments to code that serves every call of the same specialization:
capture, Inductor (or another torch.compile backend), and the guards under which the code may run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._capture import CannotCapture, Captured, StepAside, capture, first_line
from ._config import CompileConfig
from ._ir import Impl
from ._specialization import Arguments, GuardedCall, guarded, shape_check
from ._torch_private import OpOverload, inductor_compile, lookup_backend, shape_guard_names

_log = logging.getLogger("dispatch_compile")

_INDUCTOR_DEFAULTS: Mapping[str, Any] = {
    # Our guards compare every size and stride before the code runs; the code need not do it again.
    "size_asserts": False,
    # Round where the native implementation rounds, so that compiling changes results as little as it can.
    "emulate_precision_casts": True,
}


class CannotCompile(Exception):
    """No code could be made; the message names op, implementation and cause."""


@dataclass(frozen=True)
class Code:
    """Compiled code for one specialization."""

    run: Callable[[list[Any]], Sequence[torch.Tensor]]  # takes a list that it may empty
    inputs: str  # expression that makes the list, in terms of the leaves' sources
    source: str | None  # the text of the generated code, if the backend generates any
    shape_guard: str | None  # what must hold of the dynamic sizes
    result: str  # expression that makes the op's result of `{}`, the list of output tensors
    symbolic_shapes: str


@dataclass(frozen=True)
class Specialization:
    """What one key came to: code, or the reason why there is none.

    It refers to nothing of the implementation that it was made of, so that a cache can be keyed weakly by it.
    """

    code: Code | None
    failure: str | None = None
    fatal: bool = False  # whether calls raise the failure
    # The guards on the dynamic sizes, for arguments of the right key.
    admits: GuardedCall = lambda args, kwargs: True

    def guarded_call(self, arguments: Arguments) -> GuardedCall:
        """``call(args, kwargs)`` that runs the code for arguments like these, and gives MISS for any other.

        Without code, it gives None for arguments like these.
        """
        if self.code is None:
            return guarded(arguments, None, "None", {})
        names = {**shape_guard_names(), "run": self.code.run}
        return guarded(arguments, self.code.shape_guard, self.code.result.format(f"run({self.code.inputs})"), names)


def specialize(overload: OpOverload, impl: Impl, arguments: Arguments, config: CompileConfig) -> Specialization:
    """Compile an implementation for a call's arguments.

    Raises:
        CannotCompile: it cannot be captured, or the backend failed.
    """
    start = time.perf_counter()
    try:
        captured = capture(impl.func_impl_fn, arguments)
        _log.debug("%s: captured %s:\n%s", overload, impl.provider, captured.graph.code)
        code = _compile(captured, config)
    except StepAside as reason:
        return Specialization(code=None, failure=str(reason))
    except CannotCapture as error:
        raise CannotCompile(f"{_what(overload, impl)} cannot be captured: {error}") from error.__cause__
    except Exception as error:
        raise CannotCompile(
            f"{_what(overload, impl)} cannot be compiled with {config.backend!r}: {first_line(error)}"
        ) from error
    _log.info(
        "compiled %s (%s) for %s in %.1f s",
        overload, impl.provider, code.symbolic_shapes, time.perf_counter() - start,
    )  # fmt: skip
    return Specialization(code, admits=shape_check(arguments, code.shape_guard, shape_guard_names()))


def _what(overload: OpOverload, impl: Impl) -> str:
    return f"the {impl.provider!r} implementation of {overload.name()}"


def _compile(captured: Captured, config: CompileConfig) -> Code:
    run: Callable[[list[Any]], Sequence[torch.Tensor]]
    source = None
    if config.backend == "inductor":
        inductor = inductor_compile(captured.graph, captured.inputs, {**_INDUCTOR_DEFAULTS, **config.options})
        run, source = inductor.run, inductor.source
    else:
        backend = lookup_backend(config.backend) if isinstance(config.backend, str) else config.backend
        compiled = backend(captured.graph, captured.inputs)

        def run(inputs: list[Any]) -> Sequence[torch.Tensor]:
            outputs: Sequence[torch.Tensor] = compiled(*inputs)
            return outputs

    # Only now: compiling may have added to what is assumed of the sizes.
    guards = captured.guards()
    inputs = f"[{', '.join(captured.input_sources)}]"
    return Code(run, inputs, source, guards, captured.result, captured.symbolic_shapes())
