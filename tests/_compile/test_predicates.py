"""What a ``supports_args`` reads: which are understood, and when what they read has changed."""

from __future__ import annotations

import functools
import gc
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dispatch_compile._compile.predicates import Unclear, reads_of

MODULE = types.ModuleType("settings")
MODULE.limit = 16
MODULE.table = {}


def defined(source: str, **scope: Any) -> Callable[..., Any]:
    """The function ``f`` that the source defines, in a module of its own."""
    names = {"torch": torch, "math": math, "settings": MODULE, **scope}
    exec(source, names)
    function: Callable[..., Any] = names["f"]
    return function


@pytest.mark.parametrize(
    "source",
    [
        "f = lambda x: True",
        "f = lambda x, weight=None: weight is None or weight.dtype == x.dtype",
        "f = lambda x: x.dtype in (torch.float16, torch.bfloat16) and x.is_cuda",
        "f = lambda x: x.shape[-1] % 128 == 0 and x.ndim == 2 and x.is_contiguous()",
        "f = lambda x: all(n > 1 for n in x.shape) and len(x.shape) < 5",
        "f = lambda x: math.prod(x.shape) < 2**31 and x.stride(-1) == 1 and x.device.type == 'cpu'",
        "f = lambda x: x.shape[0] <= settings.limit",
        "def f(x):\n for n in x.shape:\n  if n > 3: return False\n return True",
    ],
)
def test_understood(source):
    assert reads_of(defined(source)).unchanged()


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("f = lambda x: x.data_ptr() % 16 == 0", "reads .data_ptr"),
        ("f = lambda x: x.storage_offset() == 0", "reads .storage_offset"),
        ("f = lambda x: x.requires_grad", "reads .requires_grad"),
        ("f = lambda x: x.sum() > 0", "reads .sum"),
        ("f = lambda x: isinstance(x, torch.nn.Parameter)", "reads isinstance"),
        ("f = lambda x: type(x) is torch.Tensor", "reads torch.Tensor"),
        ("f = lambda x: type(x).__name__ == 'Tensor'", "reads .__name__"),
        ("f = lambda x: getattr(x, 'flag', False)", "reads getattr"),
        ("f = lambda x: torch.cuda.is_current_stream_capturing()", "reads _cuda_isCurrentStreamCapturing"),
        ("f = lambda x: torch.is_grad_enabled()", "reads torch.is_grad_enabled"),
        ("f = lambda x: settings.table", "reads settings.table"),
        ("f = lambda x: STATE['on']", "reads STATE"),
        ("f = lambda x: PLATFORM.is_new()", "reads .is_new"),
        ("f = lambda x: nothing", "nothing has no value yet"),
        ("def f(x):\n import os\n return os.environ", "imports os"),
        ("def f(x):\n global N\n N = 1\n return True", "STORE_GLOBAL"),
        ("def f(x):\n x.flag = 1\n return True", "STORE_ATTR"),
        ("def f(x):\n yield x", "is a generator"),
        ("def f(x): return f.on\nf.on = True", "attributes or defaults"),
        ("def f(x, seen=[]): return True", "attributes or defaults"),
        ("def f(x): return f(x)", "calls itself"),
        ("def make():\n n = 0\n def f(x):\n  nonlocal n\n  n += 1\n  return n > 1\n return f\nf = make()", "changes n"),
    ],
)
def test_not_understood(source, why):
    with pytest.raises(Unclear, match=why):
        reads_of(defined(source, STATE={"on": True}, PLATFORM=types.SimpleNamespace(is_new=lambda: True)))


@pytest.mark.parametrize("predicate", [functools.partial(max, 1), [].append, len, functools.lru_cache(lambda x: True)])
def test_only_functions_are_understood(predicate):
    with pytest.raises(Unclear, match="not a function"):
        reads_of(predicate)


def test_a_value_that_changes():
    scope: dict[str, Any] = {"A": 1, "B": (1, 2.0), "C": float("nan")}
    f = defined("f = lambda x: (A, B, C, settings.limit)", **scope)
    reads = reads_of(f)
    assert reads.unchanged()
    for name, value in (("A", True), ("A", 1.0), ("B", (1, 2)), ("C", 0.0)):
        before = f.__globals__[name]
        f.__globals__[name] = value
        assert not reads.unchanged()
        f.__globals__[name] = before
        assert reads.unchanged()
    del f.__globals__["A"]
    assert not reads.unchanged()


def test_an_attribute_of_a_module_that_changes(monkeypatch):
    reads = reads_of(defined("f = lambda x: x.shape[0] <= settings.limit"))
    monkeypatch.setattr(MODULE, "limit", 17)
    assert not reads.unchanged()
    monkeypatch.delattr(MODULE, "limit")
    assert not reads.unchanged()


def test_a_function_that_is_gone():
    reads = reads_of(defined("f = lambda x: True"))
    gc.collect()  # its globals refer to it
    assert not reads.unchanged()
