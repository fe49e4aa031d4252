"""What runs when a call is caught: a short cut for calls seen before, and the long way, on which traces watch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

from .._dispatch import hooks
from .._dispatch.active import Entry, active_modes, bodies_watched, innermost_entry, traces_of
from .._specialize.callee import full_name
from .._specialize.guards import MISS
from .._torch.dispatch import OpOverload, hide_from_dynamo, profiler
from .._trace.event import OpCall, TraceEvent
from .._trace.trace import Trace
from .route import Route

if TYPE_CHECKING:
    from .._mode import DispatchCompileMode
    from .._native import Native


def kernel_of(overload: OpOverload) -> Callable[..., Any]:
    """The kernel that catches calls of ``overload`` in every thread of the process."""

    entry, name = innermost_entry, overload.name()

    def kernel(keyset: Any, /, *args: Any, **kwargs: Any) -> Any:
        entered = entry()
        mode = entered.untraced
        if mode is not None and not profiler._is_profiler_enabled:
            route = mode.routes.get(name)
            if route is None:
                route = route_outside(entered, name)
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
    """The long way of a caught call, where the kernel's short cut does not apply."""
    modes = active_modes()
    if not modes:
        return hooks.redispatch(overload, keyset, args, kwargs)
    route = route_of(modes, overload.name())
    traces = traces_of(modes)
    if route is not None:
        return _run(route, traces, keyset, args, kwargs)
    if not traces:
        return hooks.redispatch(overload, keyset, args, kwargs)
    calls = [trace.begin(OpCall, full_name(overload), args, kwargs) for trace in traces]

    def run() -> Any:
        with bodies_watched():
            return hooks.redispatch(overload, keyset, args, kwargs)

    return _watched(traces, calls, run)


def route_outside(entry: Entry, name: Hashable) -> Route | None:
    """The route of the innermost mode from ``entry`` outwards that catches what has this name, if none traces."""
    while entry.outside is not None and entry.untraced is not None:
        route = entry.untraced.routes.get(name)
        if route is not None:
            return route
        entry = entry.outside
    return None


def run_function(native: Native, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The whole way of a call of a function, inside a mode."""
    modes = active_modes()
    for mode in modes:
        route = mode.route_of(native)
        if route is not None:
            return _run(route, traces_of(modes), None, args, kwargs)
    return native.callee.run(None, args, kwargs)


def route_of(modes: Sequence[DispatchCompileMode], name: str) -> Route | None:
    """The route of the innermost of the modes that catches an op, ``"ns::name"``; None if none does."""
    for mode in modes:
        route = mode.routes.get(name)
        if route is not None:
            return route
    return None


def _run(route: Route, traces: Sequence[Trace], keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the call in front of the traces of every mode entered on this thread."""
    if not traces:
        return route.run(keyset, args, kwargs, None)
    callee = route.callee
    shown = args[callee.parameters.hidden :]
    first, *others = events = [trace.begin(TraceEvent, callee.full_name, shown, kwargs) for trace in traces]

    def run() -> Any:
        """What is decided is told to the first event, and by it to the others."""
        try:
            return route.run(keyset, args, kwargs, first)
        finally:
            for other in others:
                other.decided_like(first)

    return _watched(traces, events, run)


def _watched(traces: Sequence[Trace], calls: Sequence[OpCall], run: Callable[[], Any]) -> Any:
    """Run the call that began in the traces, and tell them how it ends."""
    try:
        result = run()
    except BaseException as error:
        for trace, call in zip(traces, calls, strict=True):
            trace.end_raising(call, error)
        raise
    for trace, call in zip(traces, calls, strict=True):
        trace.end(call, result)
    return result
