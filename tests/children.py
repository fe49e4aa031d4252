"""Programs in fresh processes that need not import torch's compiler each for itself: children of one that only imports
it. They are as fresh as others, but for addresses, which may be those of the others."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
import types
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

MODULES = ["dispatch_compile", "torch._inductor.compile_fx"]


def printed_by(program: str, arguments: Sequence[str]) -> str:
    """What a program prints, run as ``python -c program *arguments`` runs it.

    Raises:
        RuntimeError: it raised.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=[program, list(arguments), there])
    process.start()
    there.close()
    error, printed = here.recv()
    process.join()
    if error is not None:
        raise RuntimeError(error)
    return printed


def _run(program: str, arguments: list[str], answer: Any) -> None:
    sys.argv = ["-c", *arguments]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    error, printed = None, StringIO()
    try:
        with redirect_stdout(printed):
            exec(compile(program, "<string>", "exec"), vars(main))
    except BaseException:
        error = traceback.format_exc()
    answer.send((error, printed.getvalue()))
