"""Run IR ops compiled inside opaque torch custom ops, and leave every other op alone."""

from . import _registry, ops, vllm
from ._body import compile_natives
from ._cache import CacheStats, NativeCache
from ._config import CompileConfig
from ._errors import CompileError, DispatchCompileWarning
from ._ir import IrOp, IrOpImpl, register_op
from ._mode import DispatchCompileMode
from ._registry import register_native
from ._trace import Trace, TraceEvent

__all__ = [
    "CacheStats",
    "CompileConfig",
    "CompileError",
    "DispatchCompileMode",
    "DispatchCompileWarning",
    "IrOp",
    "IrOpImpl",
    "NativeCache",
    "Trace",
    "TraceEvent",
    "compile_natives",
    "ops",
    "register_native",
    "register_op",
]

_registry.add_source(vllm.ir_ops)
