"""What vLLM's settings leave to do, and saying so once."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

from .._basics.errors import warn
from ._required import required

log = logging.getLogger("dispatch_compile")


@functools.cache
def say_once(text: str) -> None:
    """Log, and warn of, something that runs slower than it could."""
    warn(text, stacklevel=3)


@functools.cache
def log_once(text: str) -> None:
    """Log something that is as asked."""
    log.warning("%s", text)


def compilation_off() -> str | None:
    """Why vLLM compiles nothing under the configuration that is current; None if it does, or none is current."""
    from vllm.config import CompilationMode, get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is None:
        return None
    compilation = config.compilation_config
    if compilation.mode == CompilationMode.NONE:
        eager = config.model_config is not None and config.model_config.enforce_eager
        return "vLLM's compilation is off: " + ("enforce_eager is set" if eager else "compilation_config.mode is NONE")
    if compilation.backend == "eager":
        return "vLLM's compilation is off: compilation_config.backend is 'eager'"
    return None


def warn_if_not_wrapped(ir_op_module: ModuleType) -> None:
    """Say so if vLLM's IR ops go past torch, where no mode can see them."""
    if not required(ir_op_module, "_ENABLE_TORCH_WRAP", "tell whether its IR ops pass through torch"):
        say_once(
            "vLLM's torch wrapping is off, so its IR ops do not pass through torch, and cannot be caught; set "
            "compilation_config.ir_enable_torch_wrap=True, or call vllm.ir.set_default_torch_wrap(True)"
        )
