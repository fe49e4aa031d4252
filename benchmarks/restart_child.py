"""The first call of an op in a process: ``python -m benchmarks.restart_child WAY OP DEVICE FILE``.

Prints, as JSON, the seconds that the call took and what was compiled and loaded for it. It imports nothing of what the
call may need, since importing is much of what a first call takes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dispatch_compile import DispatchCompileMode, IrOp, NativeCache

from .cases import CASES, Case, Inputs, Sizes

TOKENS, HIDDEN = 8, 4096

TORCH_COMPILE = "torch.compile"
OURS = "ours"
LOADED = "ours, loaded"


class Ours:
    """The op in a mode, with the cache of ``file`` if there is one; it is saved there if it was compiled."""

    def __init__(self, op: IrOp, file: str, load: bool) -> None:
        self.call: Callable[..., Any] = op.torch_op
        self._file, self._load = file, load
        self._cache: NativeCache | None = None

    def context(self) -> AbstractContextManager[Any]:
        self._cache = NativeCache.load(self._file) if self._load else NativeCache()
        return DispatchCompileMode(cache=self._cache)

    def proof(self) -> dict[str, int]:
        assert self._cache is not None
        stats = self._cache.stats()
        if not self._load:
            self._cache.save(self._file)
        return {"compiles": stats.compiles, "loads": stats.loads}


class TorchCompile:
    """The op's native implementation in ``torch.compile(dynamic=True)``."""

    def __init__(self, case: Case) -> None:
        self.call: Callable[..., Any] = torch.compile(case.plain, dynamic=True, fullgraph=True)

    def context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def proof(self) -> dict[str, int]:
        from torch._dynamo.utils import counters

        return {"compiles": counters["stats"]["unique_graphs"], "loads": 0}


def main() -> None:
    name, op, device, file = sys.argv[1:]
    torch.set_num_threads(1)
    arguments = CASES[op].arguments(Inputs(Sizes(TOKENS, HIDDEN, torch.bfloat16, device)))
    way = TorchCompile(CASES[op]) if name == TORCH_COMPILE else Ours(CASES[op].op, file, load=name == LOADED)
    synchronize: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    with torch.inference_mode(), way.context():
        way.call(*arguments)
    synchronize()
    print(json.dumps({"seconds": time.perf_counter() - start, **way.proof()}))


if __name__ == "__main__":
    main()
