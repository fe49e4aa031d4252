"""vLLM: its IR ops, found when vLLM is imported. This module never imports vLLM itself."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from ._ir import Op


def ir_ops() -> Iterable[Op]:
    """The ops in ``vllm.ir``'s registry; none while vLLM is not imported."""
    module = sys.modules.get("vllm.ir.op")
    registry = getattr(getattr(module, "IrOp", None), "registry", None)  # absent while vLLM is being imported
    return registry.values() if registry else ()
