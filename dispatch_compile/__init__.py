"""Run plain PyTorch compiled inside opaque torch custom ops, and leave every other op alone.

The examples in the docstrings start from these two lines:

>>> import torch
>>> import dispatch_compile as dc
>>> with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), trace=True) as mode:
...     y = dc.ops.silu_and_mul(torch.ones(8, 256))
>>> print(mode.trace)
dispatch_compile::silu_and_mul(t: f32[8, 256])  ->  t: f32[8, 128]  # compiled native, new: [s0, 256]

``backend="eager"`` keeps them quick: it runs the captured graph without a compiler. Leave it out to have Inductor.
"""

from ._version import __version__  # isort: skip - first, for it looks whether torch's version will do

from . import ops, vllm
from ._basics.errors import CompileError, DispatchCompileWarning
from ._body import compile_natives
from ._cache.cache import CacheStats, NativeCache
from ._cache.counters import counters
from ._call.explain import Explanation
from ._compile.config import CompileConfig
from ._dispatch.active import inherit_modes
from ._enable import disable, enable
from ._ir import registry
from ._ir.embedded import IrOp, IrOpImpl, register_op
from ._ir.references import register_native
from ._mode import DispatchCompileMode
from ._native import native
from ._saved.container import ArtifactError
from ._trace.event import OpCall, TraceEvent
from ._trace.trace import Trace

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

registry.add_source(vllm.ir_ops, poll=vllm.registered_ir_ops, called_through_torch=vllm.ir_ops_called_through_torch)
