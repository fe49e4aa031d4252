"""Counts of what became of calls: per op and cache, and over the whole process."""

from __future__ import annotations

import weakref
from collections import Counter

KINDS = ("compiles", "hits", "fallbacks", "asides", "loads")


class OpCounters:
    """The counts of one op in one cache. They need no lock: CPython switches threads where Python code calls or jumps,
    and not in ``+=`` on an attribute or on an item that is there.

    Attributes:
        compiles: specializations compiled.
        hits: calls that ran compiled, including the first call of each specialization.
        fallbacks: calls that ran eagerly, since there was no compiled code for them.
        asides: calls that stepped aside.
        loads: specializations whose code was loaded instead of compiled.
        reasons: how often each reason kept a call from running compiled.
    """

    def __init__(self) -> None:
        self.compiles = self.hits = self.fallbacks = self.asides = self.loads = 0
        self.reasons: Counter[str] = Counter()

    def fell_back(self, reason: str) -> None:
        self.fallbacks += 1
        self._count(reason)

    def stepped_aside(self, reason: str) -> None:
        self.asides += 1
        self._count(reason)

    def _count(self, reason: str) -> None:
        self.reasons.setdefault(reason, 0)  # a Counter's own way to give a new key its 0 is Python code
        self.reasons[reason] += 1


CountersByOp = dict[str, OpCounters]

_living: dict[int, CountersByOp] = {}
_of_the_dead: dict[str, Counter[str]] = {}


def count_for(cache: object, by_op: CountersByOp) -> None:
    """Have :func:`counters` include a cache's counts, also after the cache is gone."""
    number = id(by_op)
    _living[number] = by_op
    weakref.finalize(cache, _bury, number)


def _bury(number: int) -> None:
    _add_to(_of_the_dead, _living.pop(number))


def counters() -> dict[str, Counter[str]]:
    """Counts what became of calls in the whole process, over all modes and threads: for a server's metrics, say.

    >>> @dc.native
    ... def scaled(x):
    ...     return 2 * x
    >>> with dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager")):
    ...     y = scaled(torch.ones(8)), scaled(torch.ones(16)), scaled(torch.ones(8, device="meta"))
    >>> {kind: counts["__main__.scaled"] for kind, counts in dc.counters().items() if kind != "reasons"}
    {'compiles': 1, 'hits': 2, 'fallbacks': 0, 'asides': 1, 'loads': 0}
    >>> dc.counters()["reasons"]["x is on the meta device"] > 0
    True

    Returns:
        A snapshot, in the manner of ``torch._dynamo.utils.counters``. ``"compiles"``, ``"hits"``, ``"fallbacks"``,
        ``"asides"`` and ``"loads"`` each count by op (``"ns::name.overload"``) or function (``"module.qualname"``);
        :class:`CacheStats` explains them. ``"reasons"`` counts why calls did not run compiled.
    """
    totals = {name: Counter(counts) for name, counts in _of_the_dead.items()}
    for by_op in list(_living.values()):
        _add_to(totals, by_op)
    return {name: totals.get(name, Counter()) for name in (*KINDS, "reasons")}


def _add_to(totals: dict[str, Counter[str]], by_op: CountersByOp) -> None:
    for op, counts in list(by_op.items()):
        for kind in KINDS:
            count = getattr(counts, kind)
            if count:
                totals.setdefault(kind, Counter())[op] += count
        totals.setdefault("reasons", Counter()).update(counts.reasons.copy())
