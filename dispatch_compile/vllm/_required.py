"""What the package reads of vLLM, and the error for a vLLM that has it no longer."""

from __future__ import annotations

import sys
from typing import Any


def required(owner: Any, name: str, purpose: str) -> Any:
    """``owner.name``.

    Raises:
        RuntimeError: there is no such attribute; the text names it, its class or module, vLLM's version, the purpose.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        raise missing(owner, name, purpose) from None


def missing(owner: Any, name: str, purpose: str) -> RuntimeError:
    """The error for an attribute that is not there."""
    kind = getattr(owner, "__name__", None) or type(owner).__name__
    version = getattr(sys.modules.get("vllm"), "__version__", "of unknown version")
    return RuntimeError(
        f"vLLM {version} has no {kind}.{name}, which dispatch_compile needs to {purpose}. It is tested with vLLM "
        f"0.23.0 and 0.33.0: use one of these, or a dispatch_compile made for this one"
    )
