"""Which ops are opaque: ops of other libraries than torch itself, whose bodies a trace shows as nesting."""

from __future__ import annotations

import torch

from .._torch.dispatch import OpOverload, all_op_names, has_kernel, has_schema
from .hooks import hookable

# Namespaces that torch 2.11 to 2.15 register ops in. tests/_dispatch/test_opaque.py compares them with the installed
# torch.
TORCH_NAMESPACES = frozenset(
    """
    _c10d_functional _c10d_functional_autograd _dtensor _inductor_test _native _native_aot _quantized _test aten
    c10d c10d_functional coor debug_mode_ops debugprims export flex_gemm flex_lib fsdp inductor inductor_prims
    mempool mkl mkldnn mkldnn_prepacked onednn onnx onnx_symbolic prepacked prim prims profiler quantization quantized
    quantized_decomposed rngprims sparse static_runtime streams symm_mem
    """.split()
)


def opaque_overloads() -> set[OpOverload]:
    """Every op registered now, by whatever library, whose body may call IR ops and whose calls can be caught."""
    found = set()
    for qualified in all_op_names():
        namespace, _, rest = qualified.partition("::")
        if namespace in TORCH_NAMESPACES or not has_schema(qualified):
            continue
        name, _, overload_name = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace), name, None)
        overload = getattr(packet, overload_name or "default", None)
        # An op that decomposes for autograd never reaches the key where calls are caught.
        if overload is None or has_kernel(overload, "CompositeImplicitAutograd"):
            continue
        if hookable(overload):
            found.add(overload)
    return found
