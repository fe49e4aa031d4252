"""Ranges in torch.profiler's timelines, for as long as a profiler is on."""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any, cast

from torch import Tensor
from torch.profiler import record_function

from .._specialize.guards import GuardedCall


def in_profiler_range(call: GuardedCall, name: str) -> GuardedCall:
    """A guarded call whose code runs in a range of that name, but only where its guards hold.

    It is made anew for each call while a profiler is on, so that the calls of all other times are as short as can be.
    """
    function = cast(FunctionType, call)
    run = function.__globals__["run"]

    def ranged_run(inputs: list[Any]) -> Sequence[Tensor]:
        with record_function(name):
            outputs: Sequence[Tensor] = run(inputs)
        return outputs

    return FunctionType(function.__code__, {**function.__globals__, "run": ranged_run})
