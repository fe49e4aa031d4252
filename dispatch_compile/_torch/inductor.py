"""Private names of torch's compilers, Dynamo and Inductor.

Importing them takes seconds, so each function does it when called.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

# OpOverload and OpOverloadPacket have no public name; torch.ops hands them out.
from torch._ops import OpOverload, OpOverloadPacket

from .capture import without_early_decompositions
from .dispatch import has_schema, overload_named

if TYPE_CHECKING:
    from .capture import FakeTensorMode, ShapeEnv

__all__ = [
    "InductorCode",
    "NoCompiler",
    "causes",
    "compile_lock",
    "compile_lock_if_imported",
    "compile_node",
    "forget_failed_compilations",
    "forget_inductors_threads",
    "functional_op",
    "graph_pass",
    "inductor_compile",
    "inductor_option_type",
    "inductor_options",
    "inductors_ops",
    "is_compiled",
    "known_backends",
    "lookup_backend",
    "missing_compiler",
]


class NoCompiler(RuntimeError):
    """torch's compiler cannot be imported in this process."""


_import_failure: str | None = None


def compile_lock() -> Any:
    """Dynamo's lock: Inductor keeps state in globals, and torch.compile on another thread takes this one.

    Raises:
        NoCompiler: Dynamo cannot be imported, or could not before: torch registers things when it is imported, and
            fails for another reason if it finds them registered.
    """
    global _import_failure
    if _import_failure is None:
        try:
            from torch._dynamo.convert_frame import compile_lock as lock
        except Exception as error:
            _import_failure = f"{type(error).__name__}: {error}"
            raise NoCompiler(_no_compiler()) from error
        return lock
    raise NoCompiler(_no_compiler())


def _no_compiler() -> str:
    return f"torch's compiler cannot be imported, for the life of this process: {_import_failure}"


def compile_lock_if_imported() -> Any | None:
    """The same lock, or None as long as nobody has imported Dynamo, which takes a second."""
    return getattr(sys.modules.get("torch._dynamo.convert_frame"), "compile_lock", None)


def is_compiled(fn: object) -> bool:
    """Whether ``torch.compile`` has made the function: it then refers to the one that it was made of."""
    return hasattr(fn, "_torchdynamo_orig_callable")


def known_backends() -> list[str]:
    """The names of the backends of torch.compile."""
    from torch._dynamo import list_backends

    names: list[str] = list_backends(exclude_tags=())
    return names


def inductor_options() -> list[str]:
    """The names of Inductor's options."""
    from torch._inductor import list_options

    names: list[str] = list_options()
    return names


def inductor_option_type(name: str) -> Any:
    """The type that Inductor declares for one of its options, which may be of ``typing``; None if it declares none."""
    from torch._inductor import config

    try:
        return config.get_type(name)  # type: ignore[attr-defined]  # torch makes a class of the module
    except KeyError:
        return None


def forget_inductors_threads() -> None:
    """For a forked child: Inductor forgets its processes there, but goes on waiting for its threads, which the child
    does not have."""
    inductor = getattr(sys.modules.get("torch._inductor.async_compile"), "AsyncCompile", None)
    if inductor is not None:
        inductor.pool.cache_clear()


class InductorCode:
    """Inductor's code for a graph, called below the wrappers that torch.compile puts around it."""

    def __init__(self, code: Any) -> None:
        from torch._inductor.codecache import PyCodeCache, get_path

        self._code = code  # its finalizer takes the callable apart
        self.run: Callable[[list[Any]], Sequence[torch.Tensor]] = code.current_callable
        self.source: str = code.source_code
        self.path: str = get_path(code.cache_key, "py")[2]  # the code itself knows the name, but not the folder
        for module in [module for module in PyCodeCache.modules if module.__file__ == self.path][-1:]:
            weakref.finalize(self, _forget_module, module).atexit = False

    def strides(self, shape_env: ShapeEnv) -> list[tuple[Any, ...] | None]:
        """The strides of each result in terms of the symbols of the ShapeEnv, where Inductor tells."""
        return [
            None if texts is None else tuple(shape_env.deserialize_symexpr(text) for text in texts)
            for texts in self._code.output_strides
        ]


def _forget_module(module: ModuleType) -> None:
    """Free a module that Inductor generated: it loads one for each compilation, also of code that it has, and keeps
    them all. Only ``PyCodeCache.cache_clear`` lets go of them, of all at once."""
    from torch._inductor.codecache import PyCodeCache

    with suppress(ValueError):  # somebody may have cleared the cache
        PyCodeCache.modules.remove(module)
    if sys.modules.get(module.__name__) is module:  # else code that was loaded later goes by the name
        del sys.modules[module.__name__]
        PyCodeCache.linemaps.pop(str(module.__file__), None)


def compile_node(node: torch.fx.Node) -> None:
    """Let Inductor compile a node although the option ``fallback_by_default`` makes it call ATen's kernels. What
    ``torch.fx.traceback.annotate`` does for the nodes of a region, under the name that Inductor looks for."""
    node.meta["custom"] = {**node.meta.get("custom", {}), "compile_with_inductor": {}}


def graph_pass(run: Callable[[torch.fx.Graph], None], sources: Sequence[str], data: Sequence[str] = ()) -> Any:
    """A pass over graphs for Inductor's options, whose cache on disk goes by the text of the files ``sources`` and by
    ``data``. Of the classes that the options' documentation asks for, only torch._inductor has one."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Pass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            run(graph)

        def uuid(self) -> Any:
            return get_hash_for_files(tuple(sources), " ".join(data))

    return Pass()


def inductor_compile(
    graph: torch.fx.GraphModule,
    inputs: list[Any],
    options: Mapping[str, Any],
    decompositions: Mapping[OpOverload, Callable[..., Any] | None] | None = None,
) -> InductorCode:
    """Compile a graph whose outputs are fresh tensors and which changes no input.

    ``torch._inductor.standalone_compile`` is the public way, but its artifact costs more per call than the code, and
    it decomposes every op in its own way; here ``decompositions`` come first (one that gives NotImplemented leaves a
    call to Inductor's), and None leaves an op as it is.
    """
    # Each patch of a torch config leaves a variable in the context that it was applied in: not the thread's own.
    return copy_context().run(_inductor_compile, graph, inputs, options, decompositions or {})


def _inductor_compile(
    graph: torch.fx.GraphModule,
    inputs: list[Any],
    options: Mapping[str, Any],
    decompositions: Mapping[OpOverload, Callable[..., Any] | None],
) -> InductorCode:
    from torch._functorch import config as functorch_config
    from torch._guards import TracingContext, tracing
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensor

    if options.get("cpp_wrapper", inductor_config.cpp_wrapper):
        raise ValueError("its cpp_wrapper makes code that is not called so; set options={'cpp_wrapper': False}")
    compiled: list[tuple[Any, int, int]] = []

    def inner_compile(graph: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        # From torch 2.13 on; Inductor's cache on disk takes no code that was made with a table of its own.
        kwargs.pop("get_decomp_fn", None)
        code = compile_fx_inner(graph, inputs, **kwargs)
        compiled.append((code, len(inputs), _output_count(graph)))
        return code

    expected = (len(inputs), _output_count(graph))
    fake_mode = next((fake.fake_mode for fake in inputs if isinstance(fake, FakeTensor)), None)
    with (
        without_early_decompositions(),
        tracing(TracingContext(fake_mode)),
        functorch_config.patch(enable_autograd_cache=False),  # a hit there skips inner_compile
        inductor_config.patch(dict(options)),
        _without_symbols_of_floats(fake_mode),
        torch.no_grad(),
    ):
        table = None
        if decompositions:
            table = dict(select_decomp_table())
            for op, own in decompositions.items():
                inductors = table.pop(op, None)
                if own is not None:
                    table[op] = _first_of(own, inductors)
                else:
                    _fall_back(op)
        compile_fx(graph, inputs, inner_compile, dict(options), table)
    counts = [tuple(counts) for _, *counts in compiled]
    if counts != [expected]:
        raise RuntimeError(f"AOTAutograd made graphs of {counts} inputs and outputs where one of {expected} was given")
    return InductorCode(compiled[0][0])


def _fall_back(op: OpOverload) -> None:
    """Have Inductor call ATen's kernel of an op that it has no lowering for. It comes to that by itself, but fails if
    the environment says ``CI``, to remind its developers that it could decompose the op."""
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    if op not in lowerings:
        constraint = tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
        make_fallback(op, layout_constraint=constraint, warn=False, override_decomp=True)


@contextmanager
def _without_symbols_of_floats(fake_mode: FakeTensorMode | None) -> Iterator[None]:
    """Tell the pass that replaces Dynamo's symbols of floating-point numbers that ours are replaced already; it would
    ask Dynamo to start again."""
    from torch._dynamo.symbolic_convert import TensorifyState
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    shape_env = getattr(fake_mode, "shape_env", None)
    names = {str(s) for s in getattr(shape_env, "backed_var_to_val", ()) if symbol_is_type(s, SymT.FLOAT)}
    for name in names:
        TensorifyState.specialize(name)
    try:
        yield
    finally:
        TensorifyState.force_specializations -= names


def _first_of(own: Callable[..., Any], other: Callable[..., Any] | None) -> Callable[..., Any]:
    """A decomposition that is the other one where the first gives NotImplemented."""

    def decomposition(*args: Any, **kwargs: Any) -> Any:
        parts = own(*args, **kwargs)
        return other(*args, **kwargs) if parts is NotImplemented and other is not None else parts

    return decomposition


def _output_count(graph: torch.fx.GraphModule) -> int:
    return len(next(iter(reversed(graph.graph.nodes))).args[0])


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from, or wraps: Inductor wraps errors in its own, ``from None``."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or getattr(cause, "inner_exception", None)


def forget_failed_compilations() -> None:
    """Have Inductor try again what the C++ compiler or Triton could not compile: it keeps such failures by the code."""
    codecache = sys.modules.get("torch._inductor.codecache")
    async_compile = sys.modules.get("torch._inductor.async_compile")
    if codecache is not None:
        codecache.CppPythonBindingsCodeCache.cache.clear()  # its cache_clear() also unloads what is in use
    if async_compile is not None:
        async_compile.CompiledTritonKernels.cache_clear()


def missing_compiler(error: BaseException) -> str | None:
    """``"C++"`` or ``"Triton"`` if an error says that Inductor does not find it; no public type tells."""
    exceptions = sys.modules.get("torch._inductor.exc")
    for attribute, compiler in (("InvalidCxxCompiler", "C++"), ("TritonMissing", "Triton")):
        if any(isinstance(cause, getattr(exceptions, attribute, ())) for cause in causes(error)):
            return compiler
    return None


def functional_op(op: OpOverload) -> OpOverload:
    """The ATen op that returns what ``op`` writes to an argument, for ``x.exp_()`` and ``out=``, which AOTAutograd
    makes of it; an op that writes to none is its own."""
    if not op._schema.is_mutable or op.namespace != "aten":
        return op
    packet: OpOverloadPacket | None = getattr(
        torch.ops.aten, op._schema.name.removeprefix("aten::").removesuffix("_"), None
    )
    if packet is None:
        return op
    parameters = [str(argument.type) for argument in op._schema.arguments if not argument.is_out]
    for overload in packet.overloads():
        functional = overload_named(packet, overload)
        same = parameters == [str(argument.type) for argument in functional._schema.arguments]
        if same and not functional._schema.is_mutable:
            return functional
    return op


def inductors_ops() -> list[OpOverload]:
    """The ATen ops that Inductor decomposes, or has code of its own for."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import lowerings

    known = {op for op in (*select_decomp_table(), *lowerings) if isinstance(op, OpOverload)}
    return sorted((op for op in known if op.namespace == "aten" and has_schema(op.name())), key=OpOverload.name)


def lookup_backend(name: str) -> Callable[..., Any]:
    """A torch.compile backend by its registered name; ``torch.compiler`` lists them but does not hand them out."""
    from torch._dynamo import lookup_backend as lookup

    backend: Callable[..., Any] = lookup(name)
    return backend
