"""What an opaque op of the demo is to the rest of it, and how such an op is registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.library import Library, infer_schema

NAMESPACE = "dispatch_compile_demo"

_library = Library(NAMESPACE, "FRAGMENT")  # the ops live as long as it does


@dataclass(frozen=True)
class Setup:
    """What the demo's ops are run with."""

    device: str
    dtype: torch.dtype
    experts: int
    ir: str  # where the IR ops come from, a name that ``ir_ops.ir_ops`` knows

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The dtype of what activations are multiplied with, and so of the product's arithmetic.

        On CPUs without 16-bit units a 16-bit product takes up to twenty times as long as a float32 one, and
        beside it nothing else in the demo would show.
        """
        return torch.float32 if self.device == "cpu" else self.dtype


@dataclass(frozen=True)
class Workload:
    """An opaque op, and the arguments to call it with for a number of tokens: the same ones every time."""

    name: str
    op: Callable[..., torch.Tensor]
    arguments: Callable[[int], tuple[Any, ...]]


def register_opaque_op(body: Callable[..., Any], fake: Callable[..., Any], mutates_args: Sequence[str] = ()) -> None:
    """Make ``torch.ops.dispatch_compile_demo.<name of body>``, as vLLM makes its ops.

    That is the short way, past ``torch.library.custom_op``: the body is itself the kernel at a backend's dispatch
    key, and only the dispatcher stands between a call and the body.

    Args:
        body: the op, for every backend; its type hints become the schema.
        fake: the result's shape, for compilers, which see nothing of the body.
        mutates_args: parameters that the body writes to.
    """
    name = body.__name__
    _library.define(name + infer_schema(body, mutates_args=mutates_args))
    for dispatch_key in ("CPU", "CUDA"):
        _library.impl(name, body, dispatch_key=dispatch_key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def generator(device: str, seed: int) -> torch.Generator:
    """A source of random numbers that gives the same ones in every run."""
    return torch.Generator(device).manual_seed(seed)
