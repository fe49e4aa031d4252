"""From an implementation and a call's arguments to code that serves every call of the same specialization:
capture, Inductor (or another torch.compile backend), and the guards under which the code may run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from .._ir.protocol import Impl
from .._ir.references import NativeImpl
from .._numerics.arithmetic import treatment
from .._specialize.arguments import Arguments, Learned, Parameters, with_tokens
from .._specialize.guards import evaluated, holds
from .._specialize.stand_ins import Relearn, StepAside
from .._torch.capture import forget_shape_envs, guard_functions
from .._torch.inductor import (
    InductorCode,
    inductor_compile,
    lookup_backend,
)
from .capture import CannotCapture, Captured, capture
from .config import CompileConfig
from .failure import WrongReference, cannot_compile, may_pass, not_captured
from .layouts import Layout, corrections, eager_layouts, promised_layouts
from .options import options_for
from .program import Program, Run, copy_of
from .reference import why_wrong
from .specialization import Code, Specialization

# The number of tokens that code is tuned for. Taken from the first call, it would depend on which call comes first,
# and code tuned for a few tokens is slow at many: on a CPU it runs on one core, and on an H100 silu_and_mul took
# twice as long. Code tuned for many tokens is hardly slower at few. Inductor assumes as many where it knows nothing.
TOKENS_TO_TUNE_FOR = 8192

# An engine may have left little of the device's memory; this is more than its caches hold, so that tuning sees memory.
BYTES_TO_TUNE_ON = 128 * 2**20


def specialize(
    name: str, impl: Impl, parameters: Parameters, arguments: Arguments, config: CompileConfig, origin: object
) -> Specialization:
    """Compile an implementation for a call's arguments.

    Raises:
        StepAside: compiled code is not for this call, or not for this implementation.
        CannotCompile: it cannot be captured, or the backend failed.
        CannotCompileNow: the same, for lack of memory, disk space or the like.
        WrongReference: it was given to register_native, and its results are not what the op's own are.
        Relearn: the arguments are to be read otherwise.
    """
    try:
        wrong = why_wrong(impl, arguments) if isinstance(impl, NativeImpl) else None
        if wrong is not None:
            raise WrongReference(wrong)
        code = _code_for(impl, parameters, arguments, config)
    except CannotCapture as error:
        _fix_numbers(arguments)
        raise not_captured(name, impl, error) from error.__cause__
    except (StepAside, WrongReference):
        raise
    except Exception as error:
        if not may_pass(error):
            _fix_numbers(arguments)
        raise cannot_compile(name, impl, config, error) from error
    finally:
        forget_shape_envs()
    return Specialization.of(code, arguments, origin)


def _fix_numbers(arguments: Arguments) -> None:
    """After a failure: have the numbers that change be constants of the code, if there are any.

    Raises:
        Relearn: there are.
    """
    if arguments.dynamic_numbers:
        raise Relearn(Learned(fixed=frozenset(leaf.name for leaf in arguments.dynamic_numbers)))


def foresee(
    name: str, impl: Impl, parameters: Parameters, arguments: Arguments, config: CompileConfig
) -> Specialization:
    """What :func:`specialize` would come to, as far as that can be told without compiling. Its code cannot be run.

    Raises:
        StepAside, CannotCompile, Relearn: as :func:`specialize` does.
    """
    try:
        captured = capture(impl, parameters, arguments, config)
    except CannotCapture as error:
        raise not_captured(name, impl, error) from error.__cause__
    finally:
        forget_shape_envs()
    return Specialization.of(_code(captured, _not_compiled), arguments, "it is not compiled")


def _not_compiled(inputs: list[Any]) -> list[torch.Tensor]:
    raise AssertionError("called before it was compiled")


def _code_for(impl: Impl, parameters: Parameters, arguments: Arguments, config: CompileConfig) -> Code:
    """Code tuned for many tokens, or for the call's own number if the implementation has another graph for many."""
    tokens = _many_tokens(arguments)
    if tokens:
        with suppress(CannotCapture, StepAside):  # many tokens may be what the implementation does not take
            captured = capture(impl, parameters, arguments, config, tokens)
            if _admits(captured, arguments):
                code, eager = _compile(captured, config)
                if _admits(captured, arguments):  # compiling may have added guards
                    _tune(code, arguments)
                    _check_results(code, eager, arguments)
                    return code
    code, eager = _compile(capture(impl, parameters, arguments, config), config)
    _check_results(code, eager, arguments)
    return code


def _many_tokens(arguments: Arguments) -> dict[int, int]:
    """What size to tune for, by size of the call: sizes that are multiples of each other stay so."""
    counts = {leaf.value.size(0) for leaf in arguments.tensors if leaf.dynamic}
    if len(counts) == 1:
        return dict.fromkeys(counts, TOKENS_TO_TUNE_FOR)
    times = max(1, TOKENS_TO_TUNE_FOR // min(counts, default=1))
    return {count: count * times for count in counts}


def _admits(captured: Captured, arguments: Arguments) -> bool:
    guards = captured.guards()
    return holds(guards, arguments, guard_functions(guards))


def _tune(code: Code, arguments: Arguments) -> None:
    """Run the code on many tokens: Triton kernels choose among their configurations at their first launch."""
    tensors = arguments.tensors
    if not any(leaf.value.is_cuda for leaf in tensors):
        return
    smallest = min(leaf.value.size(0) for leaf in tensors if leaf.dynamic)
    bytes_per_token = sum(leaf.value.nbytes for leaf in tensors if leaf.dynamic) // smallest
    times = min(TOKENS_TO_TUNE_FOR, BYTES_TO_TUNE_ON // max(1, bytes_per_token)) // smallest
    many = [with_tokens(leaf, max(2, times * leaf.value.size(0))) if leaf.dynamic else leaf.value for leaf in tensors]
    _try(code, arguments.with_tensors(many))


def _check_results(code: Code, eager: list[Layout], arguments: Arguments) -> None:
    """Run the code once, and compare its results with eager's, in all but the values."""
    outputs = _try(code, arguments)
    given = None if outputs is None else list(map(Layout.of, outputs))
    if given is not None and given != eager:
        what, expected = (", ".join(map(str, layouts)) for layouts in (given, eager))
        raise RuntimeError(f"the code gives {what} where eager gives {expected}")


def _try(code: Code, arguments: Arguments) -> Sequence[torch.Tensor] | None:
    """The code's output tensors for arguments with the same key; None where it must not run, or not be tried."""
    trial = _for_trial(arguments, code.written)
    if trial is None or not holds(code.shape_guard, arguments, guard_functions(code.shape_guard)):
        return None
    outputs: Sequence[torch.Tensor] = evaluated(code.call, trial, code.names)
    return outputs


def _for_trial(arguments: Arguments, written: Sequence[str]) -> Arguments | None:
    """The arguments with copies of those that are written; None if the copies would take much memory."""
    if sum(leaf.value.nbytes for leaf in arguments.tensors if leaf.source in written) > BYTES_TO_TUNE_ON:
        return None
    tensors = [copy_of(leaf.value) if leaf.source in written else leaf.value for leaf in arguments.tensors]
    return arguments.with_tensors(tensors)


def _compile(captured: Captured, config: CompileConfig) -> tuple[Code, list[Layout]]:
    """Code for a graph, and how eager lays out its results for the call that it was captured for."""
    # Raises where eager does for such arguments: compiled code also runs where eager has no kernel for a dtype.
    eager = _eager_layouts(captured)
    owner: InductorCode | Program | None = None
    strides: Sequence[Sequence[Any] | None] = [None] * len(eager)
    if not captured.written and all(_is_known_to_be_empty(output) for output in captured.outputs):
        strides = [layout.strides for layout in eager]
        if captured.may_raise:
            run = _run_of_backend(captured.graph)
        else:
            owner = _program_of_nothing(eager)
            run = owner.load()
    elif config.backend == "inductor":
        treated = treatment(captured.graph, config.bitwise)
        options = {**options_for(captured), **treated.options, **config.options}
        owner = inductor_compile(captured.graph, captured.inputs, options, treated.decompositions)
        run = owner.run
        strides = owner.strides(captured.shape_env)
    else:
        backend = lookup_backend(config.backend) if isinstance(config.backend, str) else config.backend
        run = _run_of_backend(backend(captured.graph, captured.inputs))
    code = _code(captured, run, owner)
    texts = corrections(captured, eager, strides)
    if any(text != "None" for text in texts):
        code = replace(code, call=f"restrided({code.call}, ({', '.join(texts)},))")
    return code, eager


def _eager_layouts(captured: Captured) -> list[Layout]:
    trial = _for_trial(captured.arguments, [leaf.source for leaf in captured.written])
    if trial is None:
        return promised_layouts(captured)
    return eager_layouts(captured.graph, captured.inputs_for(trial))


def _code(captured: Captured, run: Run, owner: InductorCode | Program | None = None) -> Code:
    generated = owner if isinstance(owner, InductorCode) else None
    return Code(
        run=run,
        call=f"run([{', '.join(captured.input_sources)}])",
        source=None if generated is None else generated.source,
        shape_guard=captured.guards(),  # only now: compiling may have added to what is assumed of the sizes
        result=captured.result.expression,
        symbolic_shapes=captured.symbolic_shapes(),
        written=tuple(leaf.source for leaf in captured.written),
        result_names=captured.result.names,
        owner=owner,
        path=None if generated is None else generated.path,
        composition=captured.composition,
        surroundings=captured.surroundings,
    )


def _is_known_to_be_empty(output: torch.Tensor) -> bool:
    return 0 in output.shape and all(isinstance(dim, int) for dim in (*output.shape, *output.stride()))


def _program_of_nothing(layouts: list[Layout]) -> Program:
    """Results without elements need no kernel."""
    empty = "torch.empty_strided({}, {}, dtype={}, device={!r})".format
    results = [empty(layout.shape, layout.strides, layout.dtype, str(layout.device)) for layout in layouts]
    return Program(f"import torch\ndef call(inputs): return [{', '.join(results)}]")


def _run_of_backend(compiled: Callable[..., Any]) -> Run:
    def run(inputs: list[Any]) -> Sequence[torch.Tensor]:
        outputs: Sequence[torch.Tensor] = compiled(*inputs)
        return outputs

    return run
