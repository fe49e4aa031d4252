"""What runs when a call is caught: a short cut for calls seen before, and the long way, on which traces watch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import _hooks
from ._active import active, bodies_watched
from ._callee import full_name
from ._route import Route
from ._specialize.guards import MISS
from ._torch_private import OpOverload, hide_from_dynamo, profiler
from ._trace import OpCall, TraceEvent

if TYPE_CHECKING:
    from ._native import Native


def kernel_of(overload: OpOverload) -> Callable[..., Any]:
    """The kernel that catches calls of ``overload`` in every thread of the process."""

    thread, name = active, overload.name()

    def kernel(keyset: Any, /, *args: Any, **kwargs: Any) -> Any:
        mode = thread.untraced
        if mode is not None and not profiler._is_profiler_enabled:
            route = mode.routes.get(name)
            if route is not None:
                op = route.op()
                last, table = route.last
                # `is`: the implementation that dispatch chooses now has the table that is at hand.
                if table is not None and op is not None and op.dispatch(*args, **kwargs) is last():
                    try:
                        for call in table.calls:
                            result = call(args, kwargs)
                            if result is not MISS:
                                route.counters.hits += 1
                                return result
                    except Exception as error:
                        return route.run_after_error(keyset, args, kwargs, error, call)
        return _intercept(overload, keyset, args, kwargs)

    hide_from_dynamo(kernel)
    return kernel


def _intercept(overload: OpOverload, keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The whole way of a caught call, of which the kernel takes a short cut."""
    route = _route_of(overload.name())
    if route is not None:
        return _run(route, keyset, args, kwargs)
    if not active.traces:
        return _hooks.redispatch(overload, keyset, args, kwargs)
    calls = [trace.begin(OpCall, full_name(overload), args, kwargs) for trace in active.traces]

    def run() -> Any:
        with bodies_watched():
            return _hooks.redispatch(overload, keyset, args, kwargs)

    return _watched(calls, run)


def run_function(native: Native, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The whole way of a call of a function, inside a mode."""
    for mode in reversed(active.stack):
        route = mode.route_of(native)
        if route is not None:
            return _run(route, None, args, kwargs)
    return native.callee.run(None, args, kwargs)


def _route_of(name: str) -> Route | None:
    for mode in reversed(active.stack):
        route = mode.routes.get(name)
        if route is not None:
            return route
    return None


def _run(route: Route, keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the call in front of the traces of every mode entered on this thread."""
    if not active.traces:
        return route.run(keyset, args, kwargs, None)
    callee = route.callee
    shown = args[callee.parameters.hidden :]
    first, *others = events = [trace.begin(TraceEvent, callee.full_name, shown, kwargs) for trace in active.traces]

    def run() -> Any:
        """What is decided is told to the first event, and by it to the others."""
        try:
            return route.run(keyset, args, kwargs, first)
        finally:
            for other in others:
                other.decided_like(first)

    return _watched(events, run)


def _watched(calls: Sequence[OpCall], run: Callable[[], Any]) -> Any:
    """Run the call that began in the traces, and tell them how it ends."""
    traces = active.traces
    try:
        result = run()
    except BaseException as error:
        for trace, call in zip(traces, calls, strict=True):
            trace.end_raising(call, error)
        raise
    for trace, call in zip(traces, calls, strict=True):
        trace.end(call, result)
    return result
