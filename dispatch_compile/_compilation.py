"""From an implementation and a call's arguments to code that serves every call of the same specialization:
capture, Inductor (or another torch.compile backend), and the guards under which the code may run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ._arithmetic import treatment
from ._capture import CannotCapture, Captured, capture, first_line, float_tensor
from ._config import CompileConfig
from ._difference import Components, components_of, in_names
from ._inductor_options import options_for
from ._inlining import NO_CALLS, Composition
from ._ir import Impl
from ._layouts import Layout, corrections, eager_layouts, promised_layouts, restrided
from ._origin import Origin
from ._postponed import free_memory_of, may_pass
from ._programs import Program, Run, copy_of
from ._reference import why_wrong
from ._registry import NativeImpl
from ._specialize.arguments import Arguments, Learned, Parameters, with_tokens
from ._specialize.change import Pattern, pattern_of
from ._specialize.guards import GuardedCall, evaluated, guarded, holds
from ._specialize.memory import apart, sharing
from ._stand_ins import Relearn, StepAside
from ._surroundings import NOTHING_READ, Surroundings
from ._torch_private import (
    InductorCode,
    causes,
    forget_failed_compilations,
    forget_shape_envs,
    guard_functions,
    inductor_compile,
    lookup_backend,
    missing_compiler,
)

# The number of tokens that code is tuned for. Taken from the first call, it would depend on which call comes first,
# and code tuned for a few tokens is slow at many: on a CPU it runs on one core, and on an H100 silu_and_mul took
# twice as long. Code tuned for many tokens is hardly slower at few. Inductor assumes as many where it knows nothing.
TOKENS_TO_TUNE_FOR = 8192

# An engine may have left little of the device's memory; this is more than its caches hold, so that tuning sees memory.
BYTES_TO_TUNE_ON = 128 * 2**20


class CannotCompile(Exception):
    """No code could be made; the message names op, implementation and cause."""


class CannotCompileNow(CannotCompile):
    """The same, for a reason that may pass."""


class WrongReference(CannotCompile):
    """A reference implementation gives other results than its op, so that neither may take the other's place."""


@dataclass(frozen=True)
class Code:
    """Compiled code for one specialization."""

    run: Run  # takes a list that it may empty
    call: str  # expression for the output tensors, in terms of `names` and the leaves' sources
    source: str | None  # the text of the generated code, if the backend generates any
    shape_guard: str | None  # what must hold of the dynamic sizes
    result: str  # expression that makes the op's result of `out`, the list of output tensors
    symbolic_shapes: str
    written: tuple[str, ...] = ()  # sources of the arguments that it writes to
    result_names: Mapping[str, Any] = field(default_factory=dict)  # what `result` refers to
    owner: object = None  # what takes the code apart when it is freed, or of which it can be made again
    path: str | None = None  # the file that the backend wrote `source` to
    composition: Composition = NO_CALLS  # what became of calls of IR ops; the code is right while that holds
    surroundings: Surroundings = NOTHING_READ  # and while this does: what a function reads of the program around it

    def is_valid(self) -> bool:
        """Whether what it was made of is as it was."""
        return self.composition.holds() and self.surroundings.hold()

    @property
    def names(self) -> dict[str, Any]:
        """What the expressions refer to, beside the leaves' sources."""
        own = {"run": self.run, "restrided": restrided, "float_tensor": float_tensor}
        return {**guard_functions(self.shape_guard), **self.result_names, **own}


@dataclass(frozen=True)
class Specialization:
    """What one key came to: code, or the reason why there is none.

    It refers to nothing of the implementation that it was made of, so that a cache can be keyed weakly by it.
    """

    code: Code | None
    components: Components  # what the key is made of, for people
    pattern: Pattern  # the same, leaf by leaf
    guard: str | None = None  # what must hold of the dynamic sizes, in the parameters' names
    failure: str | None = None
    fatal: bool = False  # whether calls raise the failure
    origin: Origin | str = "there is no code"  # what the code was made of, or why that cannot be told

    @staticmethod
    def of(code: Code, arguments: Arguments, origin: Origin | str) -> Specialization:
        """The specialization of such arguments, for which there is code."""
        guard = in_names(code.shape_guard, arguments)
        components = {**components_of(arguments), **code.composition.components()}
        return Specialization(code, components, pattern_of(arguments), guard, origin=origin)

    def admits(self, arguments: Arguments) -> bool:
        """Whether the guards hold, on dynamic sizes and on the ops called inside, for arguments that have the key."""
        if self.code is None:
            return True
        guard = self.code.shape_guard
        return self.code.is_valid() and holds(guard, arguments, guard_functions(guard))

    def why_not(self) -> str:
        """Why it does not serve a call that has its key."""
        if self.code is None or self.code.is_valid():
            return f"the sizes do not satisfy {self.guard}"
        if self.code.composition.holds():
            return f"{self.code.surroundings.changed()} has changed"
        return "what the dispatch of the ops inside goes by has changed"

    @property
    def writes(self) -> bool:
        """Whether its code writes to arguments."""
        return self.code is not None and bool(self.code.written)

    def why_aside(self, arguments: Arguments) -> str | None:
        """Why the code may not run for arguments that it admits; None if it may."""
        written = () if self.code is None else self.code.written
        shared = sharing((leaf for leaf in arguments.tensors if leaf.source in written), arguments.tensors)
        return None if shared is None else f"{shared[0].name}, which is written, shares memory with {shared[1].name}"

    def guarded_call(self, arguments: Arguments, *, of_function: bool) -> GuardedCall:
        """``call(args, kwargs)`` that runs the code for arguments like these, and gives MISS for any other.

        Without code, it gives None for arguments like these.
        """
        if self.code is None:
            several = [f"2 <= {leaf.source}.size(0)" for leaf in arguments.tensors if leaf.dynamic]
            return guarded(arguments, " and ".join(several) or None, ["return None"], {}, of_function=of_function)
        code = self.code
        composed = "composition_holds()" if code.composition.asked else None
        unchanged = "surroundings_hold()" if code.surroundings else None
        guard = " and ".join(filter(None, [code.shape_guard, *_separate(code, arguments), composed, unchanged])) or None
        names = {**code.names, "apart": apart, "changed": torch.autograd.graph.increment_version}
        names["composition_holds"] = code.composition.holds
        names["surroundings_hold"] = code.surroundings.hold
        counted = [leaf.source for leaf in arguments.tensors if not leaf.value.is_inference()]
        changed = [f"changed({source})" for source in code.written if source in counted]
        result = [f"out = {code.call}", *changed, f"return {code.result}"]
        return guarded(arguments, guard, result, names, of_function=of_function)


def _separate(code: Code, arguments: Arguments) -> list[str]:
    """Conditions that no argument that is written shares memory with another."""
    sources = [leaf.source for leaf in arguments.tensors]
    written = [source for source in sources if source in code.written]
    return [f"apart({one}, {other})" for one in written for other in sources if other != one]


def specialize(
    name: str, impl: Impl, parameters: Parameters, arguments: Arguments, config: CompileConfig, origin: Origin | str
) -> Specialization:
    """Compile an implementation for a call's arguments.

    Raises:
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
    except StepAside as reason:
        return Specialization(None, components_of(arguments), pattern_of(arguments), failure=str(reason))
    except CannotCapture as error:
        _fix_numbers(arguments)
        raise _not_captured(name, impl, error) from error.__cause__
    except WrongReference:
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


def cannot_compile(name: str, impl: Impl, config: CompileConfig, error: BaseException) -> CannotCompile:
    """The error for an implementation that could not be compiled because of another error."""
    what = f"{_what(name, impl)} cannot be compiled with {config.backend!r}"
    cause = "; ".join(filter(None, [first_line(error), _compilers_words(error), _advice(error)]))
    if not may_pass(error):
        return CannotCompile(f"{what}: {cause}")
    free_memory_of(error)
    forget_failed_compilations()
    return CannotCompileNow(f"{what} now; later calls try again: {cause}")


def _compilers_words(error: BaseException) -> str | None:
    """The cause, where the first line of torch's error has none: in what the C++ compiler printed (the linker's first
    complaint comes before the compiler's), or at the end of the traceback of a process that compiles for Triton."""
    first, *lines = str(error).strip().splitlines() or [""]
    of_cpp = next((line.strip() for line in lines if re.search(r"\berror:|\bld: (?!warning)", line)), None)
    if of_cpp is not None:
        return of_cpp
    return lines[-1] if lines and "An exception occurred in a subprocess" in first else None


def _advice(error: BaseException) -> str | None:
    missing = missing_compiler(error)
    if missing == "C++":
        return "install g++, or name another C++ compiler by the environment variable CXX"
    if missing == "Triton":
        return "install Triton"
    if any(isinstance(cause, OSError) for cause in causes(error)):
        return "Inductor writes to the folders that the environment variables TORCHINDUCTOR_CACHE_DIR and TMPDIR name"
    return None


def foresee(
    name: str, impl: Impl, parameters: Parameters, arguments: Arguments, config: CompileConfig
) -> Specialization:
    """What :func:`specialize` would come to, as far as that can be told without compiling. Its code cannot be run.

    Raises:
        CannotCompile: it cannot be captured.
    """
    components, pattern = components_of(arguments), pattern_of(arguments)
    try:
        captured = capture(impl, parameters, arguments, config)
    except StepAside as reason:
        return Specialization(None, components, pattern, failure=str(reason))
    except CannotCapture as error:
        raise _not_captured(name, impl, error) from error.__cause__
    finally:
        forget_shape_envs()
    code = _code(captured, _not_compiled)
    components = {**components, **code.composition.components()}
    return Specialization(code, components, pattern, in_names(code.shape_guard, arguments))


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


def _not_captured(name: str, impl: Impl, error: CannotCapture) -> CannotCompile:
    return CannotCompile(f"{_what(name, impl)} cannot be captured: {error}")


def _what(name: str, impl: Impl) -> str:
    return f"the {impl.provider!r} implementation of {name}"


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
