"""Every private torch name that the package uses, each with the reason. Nothing else imports one.

``tests/test_torch_private.py`` fails by name when torch changes any of them.
"""

from __future__ import annotations

import ast
import inspect
import json
import marshal
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar, copy_context
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace, TracebackType
from typing import Any, NamedTuple

import torch
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _dispatch_find_schema_or_throw,
    _dispatch_get_all_op_names,
    _dispatch_has_kernel_for_dispatch_key,
    _dispatch_keyset_full_after,
    _dispatch_tls_is_dispatch_key_excluded,
    _ExcludeDispatchKeyGuard,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)

# See hide_from_dynamo.
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

# torch.compile's own C++ guards: one call checks what would take Python twenty.
from torch._C._dynamo.guards import GlobalStateGuard, TensorGuards

# The class behind torch.library.custom_op, to tell a decorated op from a function.
from torch._library.custom_ops import CustomOpDef

# OpOverload and OpOverloadPacket have no public name; torch.ops hands them out.
from torch._ops import OpOverload, OpOverloadPacket

# Its _is_profiler_enabled is the cheapest answer to whether a profiler is on, which every intercepted call asks.
from torch.autograd import profiler

# TorchDispatchMode's documented home is this private module, and that of the stack that it is on as well.
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

__all__ = [
    "BELOW_BACKEND_SELECT",
    "CustomOpDef",
    "GlobalStateGuard",
    "InductorCode",
    "NoCompiler",
    "OpOverload",
    "OpOverloadPacket",
    "QuietMode",
    "TensorGuards",
    "TorchDispatchMode",
    "TritonLaunch",
    "all_op_names",
    "at_least",
    "causes",
    "compile_lock",
    "compile_lock_if_imported",
    "compile_node",
    "cpp_kernel_library",
    "decomposes",
    "dispatch_modes_active",
    "dtype_abbreviation",
    "dual_level",
    "dynamic_number",
    "dynamic_size",
    "forget_failed_compilations",
    "forget_inductors_threads",
    "forget_shape_envs",
    "function_modes_active",
    "functional_op",
    "generated_module",
    "global_state",
    "graph_pass",
    "guard_functions",
    "has_kernel",
    "has_schema",
    "hide_from_dynamo",
    "in_functorch_transform",
    "inductor_compile",
    "inductor_option_type",
    "inductor_overrides",
    "inductors_ops",
    "inexact_matmul_precision",
    "is_compiled",
    "is_dynamo_compiling",
    "is_functorch_wrapped",
    "is_zero_tensor",
    "load_cpp_kernel",
    "load_triton_kernel",
    "lookup_backend",
    "missing_compiler",
    "new_fake_mode",
    "new_shape_env",
    "pop_mode",
    "profiler",
    "push_mode",
    "reinterpret_tensor",
    "shape_guard_names",
    "size_at",
    "size_depends_on_values",
    "size_text",
    "torchs_modes",
    "trace",
    "triton_launch",
    "uncompiled",
    "without_modes",
    "without_version_counting",
    "wrap_custom_op_kernels",
]

# The keys that a kernel at BackendSelect hands a call on to: the backend's own.
BELOW_BACKEND_SELECT = _dispatch_keyset_full_after(DispatchKey.BackendSelect)

# "ns::name.overload" of every op registered; torch.ops lists only what Python has touched.
all_op_names: Callable[[], list[str]] = _dispatch_get_all_op_names

# reinterpret_tensor(tensor, size, stride), both plain tuples: as Inductor's code does it, which is no view for autograd
# to know of.
reinterpret_tensor: Callable[..., torch.Tensor] = torch._C._dynamo.guards._reinterpret_tensor

# Non-zero while a TorchDispatchMode would see the ops in a native implementation's body.
dispatch_modes_active: Callable[[], int] = _len_torch_dispatch_stack

# Non-zero while a TorchFunctionMode would see the torch functions that a function calls.
function_modes_active: Callable[[], int] = _len_torch_function_stack

# Constant False, for which Dynamo, when it traces a function that asks, puts True.
is_dynamo_compiling: Callable[[], bool] = torch.compiler.is_dynamo_compiling

# The modes that torch would hand an op to now, innermost last.
torchs_modes: Callable[[], list[TorchDispatchMode]] = _get_current_dispatch_mode_stack


# Put a mode on torch's stack, as what is on top.
push_mode: Callable[[TorchDispatchMode], None] = _push_mode


def pop_mode(mode: TorchDispatchMode) -> None:
    """Take off torch's stack what is on top; ``mode`` must be that."""
    _pop_mode(getattr(mode, "_mode_key", None))


class QuietMode(TorchDispatchMode):
    """A mode that leaves Dynamo as it is: while a mode is on the stack that does not say these two, Dynamo skips what
    it meets, on every thread, and runs it eagerly.

    It leaves torch's flags about modes alone, too. They belong to the process and are put back as if all threads shared
    one stack, so of two modes whose times overlap, the one left last brings back the other's flags, for ever.
    """

    def __enter__(self) -> QuietMode:
        push_mode(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pop_mode(self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


# A context in which no TorchDispatchMode sees anything; leaving a mode and entering it again would run its own code.
without_modes: Callable[[], AbstractContextManager[object]] = _disable_current_modes


def has_schema(qualified: str) -> bool:
    """Whether ``"ns::name.overload"`` is defined. A name with kernels alone, as our hooks leave when the library that
    defined an op is gone, is listed too, and ``torch.ops`` still hands out what it handed out before."""
    name, _, overload_name = qualified.partition(".")
    try:
        _dispatch_find_schema_or_throw(name, overload_name)
    except RuntimeError:
        return False
    return True


def has_kernel(overload: OpOverload, dispatch_key: str) -> bool:
    """Whether the op has a kernel of its own at ``dispatch_key``."""
    return bool(_dispatch_has_kernel_for_dispatch_key(overload.name(), dispatch_key))


def decomposes(overload: OpOverload) -> bool:
    """Whether torch runs the op on this thread as the ops that it is made of, for autograd: it has no kernel then."""
    above_backends = not _dispatch_tls_is_dispatch_key_excluded(DispatchKey.AutogradFunctionality)
    return above_backends and has_kernel(overload, "CompositeImplicitAutograd")


def without_version_counting() -> AbstractContextManager[Any]:
    """Keep torch from noting, on this thread, that an op changes its arguments; it does so before the op runs."""
    guard: AbstractContextManager[Any] = _ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.ADInplaceOrView))
    return guard


def global_state() -> str:
    """The global state that changes what is captured, as JSON text: torch.compile's snapshot, and what is not in it."""
    state = json.loads(GlobalStateGuard().__getstate__())  # type: ignore[attr-defined]  # missing in torch's stub
    return json.dumps({**state, "inexact_matmul_precision": inexact_matmul_precision()})


def inexact_matmul_precision() -> str | None:
    """What a CPU may round float32 matrices to before it multiplies them: ``tf32`` if the precision is ``high``,
    ``bf16`` if it is ``medium``; None if nothing. The public ``get_float32_matmul_precision`` raises if somebody set
    ``fp32_precision``, and reading that takes microseconds."""
    precision: str = torch._C._get_fp32_precision_getter("mkldnn", "matmul")
    return None if precision in ("none", "ieee") else precision


def hide_from_dynamo(fn: Callable[..., Any]) -> None:
    """Make Dynamo run ``fn``, and all that it calls, as plain Python: it would trace the kernels of ops that are
    called in frames that it skipped. ``torch.compiler.disable`` does so by wrapping, which costs every call."""
    set_code_exec_strategy(fn.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def dual_level() -> int:
    """The current forward-mode AD level, -1 outside; tensors do not show that they are dual."""
    return int(torch.autograd.forward_ad._current_level)


def in_functorch_transform() -> bool:
    """Whether a functorch transform (vmap, grad, functionalize) is running on this thread."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_functorch_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a functorch transform (vmap, grad, functionalize) wraps ``tensor``; its type does not tell."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_zero_tensor(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is autograd's storage-less zero; no public test exists."""
    return bool(tensor._is_zerotensor())


def wrap_custom_op_kernels(op: CustomOpDef, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace each kernel of a ``torch.library.custom_op`` by ``wrap(kernel)``; the public API cannot read them."""
    for device_type, kernel in list(op._backend_fns.items()):
        op.register_kernel(device_type, wrap(kernel))


# ---- Capture and compilation. Importing Dynamo and Inductor takes seconds, so each function does it when called.
# Fake tensors, symbolic shapes and make_fx are how torch itself captures; only torch.export wraps them publicly,
# and it captures programs, not calls.


def new_shape_env() -> Any:
    """A ShapeEnv: the symbols of one capture and what is assumed of them."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return ShapeEnv()


def forget_shape_envs() -> None:
    """Free the ShapeEnvs of captures that are over: torch keeps each, 40 KB, as a key of caches without a bound, and
    empties these only when one comes along that knows more or less than the last."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()


def new_fake_mode(shape_env: Any | None) -> Any:
    """A FakeTensorMode, with symbols or without, that refuses real tensors: an implementation reads its arguments.

    It leaves nothing in the cache of results that all of them share, which has no bound, and where symbols keep their
    ShapeEnv alive.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(shape_env=shape_env)
    mode.cache_enabled = False
    return mode


def dynamic_size(shape_env: Any, size: int, tensor_name: str) -> torch.SymInt:
    """A fresh symbol for dimension 0 of the tensor that guards will call ``L[tensor_name]``."""
    from torch._dynamo.source import LocalSource, TensorProperty, TensorPropertySource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = TensorPropertySource(LocalSource(tensor_name), TensorProperty.SIZE, 0)
    symbol = shape_env.create_symbol(size, source, dynamic_dim=DimDynamic.DYNAMIC)
    size_symbol: torch.SymInt = shape_env.create_symintnode(symbol, hint=size, source=source)
    return size_symbol


def dynamic_number(shape_env: Any, value: float, name: str) -> torch.SymInt | torch.SymFloat:
    """A fresh symbol for an integer or floating-point number that guards will call ``L[name]``."""
    from torch._dynamo.source import LocalSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = LocalSource(name)
    symbol = shape_env.create_unspecified_symbol(value, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    make = shape_env.create_symintnode if isinstance(value, int) else shape_env.create_symfloatnode
    number: torch.SymInt | torch.SymFloat = make(symbol, hint=value, source=source)
    return number


def trace(
    fn: Callable[..., Any], inputs: Sequence[Any], decompositions: Mapping[Any, Callable[..., Any]] | None = None
) -> torch.fx.GraphModule:
    """The ATen graph of ``fn`` on symbols and fake tensors; ``decompositions`` says of what some ops are made."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with _without_early_decompositions():
        return make_fx(fn, tracing_mode="symbolic", decomposition_table=dict(decompositions or {}))(*inputs)


# Ops of which ATen has a kernel although torch registers a decomposition in Python for them.
_DECOMPOSED_EARLY = ("upsample", "hardshrink", "softshrink", "multi_margin_loss", "multilabel_margin_loss_forward")


@contextmanager
def _without_early_decompositions() -> Iterator[None]:
    """Let tracing see ops that ATen has kernels for. torch registers decompositions in Python for some, interpolation
    above all, which it applies before any table of decompositions, and which have other results."""
    import torch._decomp.decompositions  # registers them

    keys = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)
    names = [name for name in dir(torch.ops.aten) if any(part in name for part in _DECOMPOSED_EARLY)]
    packets = [getattr(torch.ops.aten, name) for name in names if "backward" not in name]
    ops = [getattr(packet, overload) for packet in packets for overload in packet.overloads()]
    removed = [(op, {key: op.py_kernels.pop(key) for key in keys if key in op.py_kernels}) for op in ops]
    try:
        for op in ops:
            op._dispatch_cache.clear()
        yield
    finally:
        for op, kernels in removed:
            op.py_kernels.update(kernels)
            op._dispatch_cache.clear()


def size_depends_on_values(value: Any) -> bool:
    """Whether a traced value has a size that only the values in a tensor tell, as ``x[x > 0]`` has."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(value))


def at_least(size: int | torch.SymInt, least: int | torch.SymInt) -> bool:
    """Whether a size or stride is known to be so large at every number of tokens; to compare it would add a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(size >= least))


def size_at(size: int | torch.SymInt, values: Mapping[str, int]) -> int:
    """What a size or stride is for these values of the symbols, by name."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({symbol: values[symbol.name] for symbol in expression.free_symbols}))


def size_text(size: int | torch.SymInt, symbols: Mapping[str, str]) -> str:
    """Python source for a size or stride; ``symbols`` has expressions by the symbols' names."""
    if isinstance(size, int):
        return str(size)
    from torch.utils._sympy.printers import PythonPrinter

    text = PythonPrinter().doprint(size.node.expr)
    return re.sub(r"[A-Za-z_]\w*", lambda match: symbols.get(match[0], match[0]), text)


def shape_guard_names() -> dict[str, Any]:
    """The names that text from ``ShapeEnv.produce_guards_expression`` refers to."""
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

    return dict(SYMPY_INTERP)


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


def inductor_option_type(name: str) -> Any:
    """The type that Inductor declares for one of its options, which may be of ``typing``; None if it declares none."""
    from torch._inductor import config

    try:
        return config.get_type(name)
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

    def strides(self, shape_env: Any) -> list[tuple[Any, ...] | None]:
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
        PyCodeCache.linemaps.pop(module.__file__, None)


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
    fake_mode = next((fake.fake_mode for fake in inputs if isinstance(fake, torch.Tensor)), None)
    with (
        _without_early_decompositions(),
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
def _without_symbols_of_floats(fake_mode: Any) -> Iterator[None]:
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


def uncompiled(fn: Any) -> Any:
    """The function that ``torch.compile`` was given, where ``fn`` is what it made of it; else ``fn`` itself.

    What ``functools.wraps`` makes around the result, and a method bound to it, have its attributes but are not it: the
    id tells. A compiled module is a module still.
    """
    made = getattr(fn, "_torchdynamo_wrapper_id", None) == id(fn) and not isinstance(fn, torch.nn.Module)
    return fn._torchdynamo_orig_callable if made else fn


def functional_op(op: OpOverload) -> OpOverload:
    """The ATen op that returns what ``op`` writes to an argument, for ``x.exp_()`` and ``out=``, which AOTAutograd
    makes of it; an op that writes to none is its own."""
    if not op._schema.is_mutable or op.namespace != "aten":
        return op
    packet = getattr(torch.ops.aten, op._schema.name.removeprefix("aten::").removesuffix("_"), None)
    parameters = [str(argument.type) for argument in op._schema.arguments if not argument.is_out]
    for overload in [] if packet is None else packet.overloads():
        functional = getattr(packet, overload)
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


def dtype_abbreviation(dtype: torch.dtype) -> str:
    """The short name that torch's own traces use: ``bf16``, ``f8e4m3fn``."""
    from torch.utils._dtype_abbrs import dtype_abbrs

    return str(dtype_abbrs.get(dtype, str(dtype).removeprefix("torch.")))


# ---- Saved code: taking Inductor's code apart, and running the parts in another process. Only taking apart may import
# Inductor. Running must not: importing it takes longer than all the rest of a first call with saved code.


def inductor_overrides() -> dict[str, Any]:
    """Inductor's settings that this process changed, apart from those that environment variables change. Inductor's
    own ways to ask import it, and mix the two."""
    config = sys.modules.get("torch._inductor.config")
    if config is None:
        return {}
    from torch.utils._config_module import _UNSET_SENTINEL as UNSET

    changed = {}
    for name, entry in config._config.items():
        value = entry.user_override
        value = value.get() if isinstance(value, ContextVar) else value  # a ContextVar from torch 2.13 on
        default = entry.default if entry.env_value_default is UNSET else entry.env_value_default
        if value is not UNSET and value != default:
            changed[name] = value
    return changed


def guard_functions(guard: str | None) -> dict[str, Any]:
    """What :func:`shape_guard_names` gives, but nothing, and without importing SymPy, for a guard that needs none of
    it: most only compare the sizes of arguments."""
    names = {node.id for node in ast.walk(ast.parse(guard or "True", mode="eval")) if isinstance(node, ast.Name)}
    return {} if all(re.fullmatch(r"a\d+(_\d+)*", name) for name in names) else shape_guard_names()


def generated_module(run: Callable[..., Any]) -> tuple[Mapping[str, Any], tuple[int, ...]] | None:
    """The namespace of the module that Inductor generated, and the positions of inputs that must be aligned, of the
    callable that it made of them; None if it has made something else, as with CUDA graphs."""
    positions: Sequence[int] = ()
    if getattr(run, "__qualname__", None) == "align_inputs_from_check_idxs.<locals>.run":
        wrapped = inspect.getclosurevars(run).nonlocals
        run, positions = wrapped["model"], wrapped["inputs_to_check"]
    namespace = getattr(getattr(run, "__func__", run), "__globals__", {})
    return (namespace, tuple(positions)) if namespace.get("call") == run else None


def cpp_kernel_library(kernel: Any) -> bytes | None:
    """The library of a C++ kernel that Inductor compiled as a Python extension module."""
    path = getattr(getattr(kernel, "__self__", None), "__file__", None)
    return Path(path).read_bytes() if path is not None and Path(path).exists() else None


def load_cpp_kernel(path: str) -> Callable[..., None]:
    """Load such a library as Inductor does: by the variable it finds torch's function that reads a tensor's address."""
    address = torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(address)
    loader = ExtensionFileLoader(f"{Path(path).name}.kernel", path)
    module = module_from_spec(spec_from_loader(loader.name, loader))  # type: ignore[arg-type]  # never None here
    loader.exec_module(module)
    kernel: Callable[..., None] = module.kernel
    return kernel


class TritonLaunch(NamedTuple):
    """A Triton kernel as torch's static launcher, which is part of torch itself, runs it.

    Attributes:
        cubin: the machine code.
        name: of the function in it.
        device: index of the CUDA device.
        shared_bytes: of shared memory for a block.
        warps: for a block.
        parameter_types: a letter for each parameter, as the launcher spells them.
        scratch: how many pointers to scratch memory, which it has none of, Triton adds to the parameters.
        grid: marshalled code object of ``launcher(*arguments, stream)``, which computes the grid and calls ``runner``.
    """

    cubin: bytes
    name: str
    device: int
    shared_bytes: int
    warps: int
    parameter_types: str
    scratch: int
    grid: bytes


def triton_launch(kernel: Any) -> TritonLaunch | None:
    """What is left of a kernel that Inductor has tuned; None if the static launcher does not run it, or if it is still
    to be tuned, or its machine code is no longer in Triton's cache."""
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
    from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel

    launchers = getattr(kernel, "launchers", [])
    if len(launchers) != 1 or torch.version.hip is not None:
        return None
    launcher = launchers[0]
    code = launcher.__code__
    static = getattr(launcher.__globals__.get("runner"), "__self__", None)
    device = kernel.triton_meta.get("device")
    calls_more = set(code.co_names) - {"runner", "max", "min"}
    # The last two came with torch 2.15: tensor descriptors among the parameters, and scratch memory that is used.
    unsupported = getattr(static, "_has_tensordesc", False) or getattr(static, "global_scratch_size", 0)
    if not isinstance(static, StaticallyLaunchedCudaKernel) or device is None or calls_more or unsupported:
        return None
    cubin = Path(triton_cache_dir(device), launcher.cache_hash, f"{static.name}.cubin")
    if not cubin.exists():
        return None
    return TritonLaunch(
        cubin=cubin.read_bytes(),
        name=static.name,
        device=device,
        shared_bytes=static.shared,
        warps=static.num_warps,
        parameter_types=static.arg_tys,
        scratch=static.has_global_scratch + static.has_profile_scratch,
        grid=marshal.dumps(code),
    )


def load_triton_kernel(kernel: TritonLaunch, cubin_path: str) -> Any:
    """An object whose ``run(*arguments, stream=...)`` launches the kernel, as generated code calls it."""
    launch = torch._C._StaticCudaLauncher._launch_kernel
    with torch.cuda.device(kernel.device):
        loaded = torch._C._StaticCudaLauncher._load_kernel(cubin_path, kernel.name, kernel.shared_bytes, kernel.device)
    function = loaded[-3]  # before the numbers of registers and spills; from torch 2.13 on, the module comes first
    warps, shared_bytes = kernel.warps, kernel.shared_bytes
    types = kernel.parameter_types + "O" * kernel.scratch
    scratch = (None,) * kernel.scratch

    def runner(grid_0: int, grid_1: int, grid_2: int, stream: int, *arguments: Any) -> None:
        launch(function, grid_0, grid_1, grid_2, warps, shared_bytes, types, (*arguments, *scratch), stream)

    return SimpleNamespace(run=FunctionType(marshal.loads(kernel.grid), {"runner": runner}))
