"""Run IR ops compiled inside opaque torch custom ops, and leave every other op alone."""

from ._version import __version__  # isort: skip - first, for it looks whether torch's version will do

from . import _registry, ops, vllm
from ._active import inherit_modes
from ._body import compile_natives
from ._cache import CacheStats, NativeCache
from ._config import CompileConfig
from ._counters import counters
from ._enable import disable, enable
from ._errors import CompileError, DispatchCompileWarning
from ._explain import Explanation
from ._ir import IrOp, IrOpImpl, register_op
from ._mode import DispatchCompileMode
from ._native import native
from ._registry import register_native
from ._saved_file import ArtifactError
from ._trace import OpCall, Trace, TraceEvent

__all__ = [
    "ArtifactError",
    "CacheStats",
    "CompileConfig",
    "CompileError",
    "DispatchCompileMode",
    "DispatchCompileWarning",
    "Explanation",
    "IrOp",
    "IrOpImpl",
    "NativeCache",
    "OpCall",
    "Trace",
    "TraceEvent",
    "__version__",
    "compile_natives",
    "counters",
    "disable",
    "enable",
    "inherit_modes",
    "native",
    "ops",
    "register_native",
    "register_op",
]

_registry.add_source(vllm.ir_ops, poll=vllm.registered_ir_ops, called_through_torch=vllm.ir_ops_called_through_torch)
