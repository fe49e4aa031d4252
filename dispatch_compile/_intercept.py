"""What runs when a call is caught: a short cut for calls seen before, and the long way, on which traces watch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import _hooks
from ._active import active, bodies_watched
from ._route import Route
from ._specialization import MISS
from ._torch_private import OpOverload, hide_from_dynamo, profiler
from ._trace import OpCall, TraceEvent


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
                    except Exception:
                        pass  # the long way deals with it
        return _intercept(overload, keyset, args, kwargs)

    hide_from_dynamo(kernel)
    return kernel


def _intercept(overload: OpOverload, keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The whole way of a caught call, of which the kernel takes a short cut."""
    route = _route_of(overload.name())
    if active.traces:
        return _run_traced(route, overload, keyset, args, kwargs)
    if route is not None:
        return route.run(keyset, args, kwargs, None)
    return _hooks.redispatch(overload, keyset, args, kwargs)


def _route_of(name: str) -> Route | None:
    for mode in reversed(active.stack):
        route = mode.routes.get(name)
        if route is not None:
            return route
    return None


def _run_traced(
    route: Route | None, overload: OpOverload, keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the call in front of the traces of every mode entered on this thread."""
    traces = active.traces
    calls: Sequence[OpCall] = []
    try:
        if route is None:
            calls = [trace.begin(OpCall, overload, args, kwargs) for trace in traces]
            with bodies_watched():
                result = _hooks.redispatch(overload, keyset, args, kwargs)
        else:
            calls = events = [trace.begin(TraceEvent, overload, args, kwargs) for trace in traces]
            result = _run_for_events(route, keyset, args, kwargs, events)
    except BaseException as error:
        for trace, call in zip(traces, calls, strict=True):
            trace.end_raising(call, error)
        raise
    for trace, call in zip(traces, calls, strict=True):
        trace.end(call, result)
    return result


def _run_for_events(
    route: Route, keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any], events: Sequence[TraceEvent]
) -> Any:
    """Run the call; what is decided is told to the first event, and by it to the others."""
    first, *others = events
    try:
        return route.run(keyset, args, kwargs, first)
    finally:
        for other in others:
            other.decided_like(first)
