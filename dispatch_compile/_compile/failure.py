"""Why no code could be made: for good, or for now, as on a full disk."""

from __future__ import annotations

import errno
import os
import re
import traceback

import torch

from .._basics.errors import first_line
from .._ir.protocol import Impl
from .._torch.inductor import (
    causes,
    forget_failed_compilations,
    missing_compiler,
)
from .capture import CannotCapture
from .config import CompileConfig


class CannotCompile(Exception):
    """No code could be made; the message names op, implementation and cause."""


class CannotCompileNow(CannotCompile):
    """The same, for a transient reason."""


class WrongReference(CannotCompile):
    """A reference implementation gives other results than its op, so that neither may take the other's place."""


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


def not_captured(name: str, impl: Impl, error: CannotCapture) -> CannotCompile:
    return CannotCompile(f"{_what(name, impl)} cannot be captured: {error}")


def _what(name: str, impl: Impl) -> str:
    return f"the {impl.provider!r} implementation of {name}"


_TYPES = (OSError, MemoryError, torch.OutOfMemoryError)

# What torch's allocator for the CPU, drivers, and compilers in processes of their own say in errors of other types; the
# last two of those that the system, or Ctrl-C, ends.
_TEXTS = (
    "out of memory",
    *map(os.strerror, (errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)),
    "signal terminated program",
    "process pool was terminated abruptly",
)


def may_pass(error: BaseException) -> bool:
    """Whether an error is of what the machine lacks now and may have later: memory, room on a disk, files."""
    return any(isinstance(one, _TYPES) or any(text in str(one) for text in _TEXTS) for one in causes(error))


def free_memory_of(error: BaseException) -> None:
    """Let go of the tensors that frames in an error's traceback hold; what runs next may need their memory."""
    for one in causes(error):
        traceback.clear_frames(one.__traceback__)
