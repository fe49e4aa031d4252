"""The results as text: aligned tables for a terminal, or Markdown for a document."""

from __future__ import annotations

from collections.abc import Iterable

from .peers import (
    APART,
    CODE_ALONE,
    COPY,
    EAGER,
    F_RMS_NORM,
    MARK_DYNAMIC,
    MULTI_KERNEL,
    OURS,
    TORCH_COMPILE,
    TUNED,
    TUNED_MULTI_KERNEL,
    VLLM,
)
from .results import CaseResult, Results, counted, versions_text, where_text
from .tables import Table, aligned, as_markdown, microseconds
from .timing import DEVICE, HOST

LIMIT = "limit"  # what the bare copy is called in a table

# Numerator and denominator, by kind of time.
RATIOS = {
    HOST: (
        (OURS, EAGER),
        (OURS, TORCH_COMPILE),
        (OURS, MARK_DYNAMIC),
        (OURS, VLLM),
        (OURS, F_RMS_NORM),
        (OURS, APART),
        (OURS, CODE_ALONE),
        (OURS, COPY),
    ),
    DEVICE: (
        (OURS, EAGER),
        (OURS, TORCH_COMPILE),
        (OURS, MARK_DYNAMIC),
        (OURS, VLLM),
        (OURS, APART),
        (TUNED, VLLM),
        (MULTI_KERNEL, VLLM),
        (TUNED_MULTI_KERNEL, VLLM),
        (OURS, COPY),
    ),
}
MAIN_RATIOS = {
    HOST: ((OURS, EAGER), (OURS, TORCH_COMPILE), (OURS, APART)),
    DEVICE: ((OURS, TORCH_COMPILE), (OURS, VLLM), (OURS, APART)),
}
NOTHING = "-"


def text(results: Results) -> str:
    """For a terminal."""
    blocks = [header(results)]
    for op in _ops(results):
        blocks += [aligned(_times_table(results, op, kind)) for kind in results.kinds]
    blocks += [aligned(table) for table in _side_tables(results)]
    blocks += _errors(results)
    return "\n\n".join(blocks)


def markdown(results: Results) -> str:
    """For a document."""
    blocks = [_caption(results)]
    blocks += [as_markdown(_flat_table(results, kind)) for kind in results.kinds]
    return "\n\n".join(blocks)


def header(results: Results) -> str:
    """What was measured, and on what."""
    settings = results.settings
    lines = [f"{name:<8}{value}" for name, value in results.machine.items()]
    lines.append(f"{'inputs':<8}{settings.dtype}, hidden size {settings.hidden}, {counted(settings.threads, 'thread')}")
    return "\n".join(lines)


def title(results: Results) -> str:
    """The same in a line."""
    settings, machine = results.settings, results.machine
    where = where_text(machine, settings.threads)
    return f"{where}, torch {machine['torch']}, {settings.dtype}, hidden size {settings.hidden}"


def what_is_measured(kind: str, device: str) -> str:
    """A kind of time, for people."""
    if device == "cpu":
        return "time per call"
    return {HOST: "host time per call, to issue it", DEVICE: "device time per call"}[kind]


def shown_peers(cases: Iterable[CaseResult], kind: str, device: str) -> list[str]:
    """The peers with times of this kind. How long a GPU's host takes to issue a copy limits nothing."""
    names = dict.fromkeys(name for case in cases for name, peer in case.peers.items() if kind in peer.times)
    return [name for name in names if name != COPY or kind == (DEVICE if device == "cuda" else HOST)]


def _caption(results: Results) -> str:
    return f"{title(results)}, {versions_text(results.machine)}. Microseconds."


def _ops(results: Results) -> list[str]:
    return list(dict.fromkeys(case.op for case in results.cases))


def _times_table(results: Results, op: str, kind: str) -> Table:
    """A column for each number of tokens, a row for each peer, and then for each ratio."""
    cases = [case for case in results.cases if case.op == op]
    device = results.settings.device
    shown = shown_peers(cases, kind, device)
    rows = [("tokens", *(str(case.tokens) for case in cases))]
    rows += [(_label(peer), *(_microseconds(case.time(peer, kind)) for case in cases)) for peer in shown]
    for ours, other in RATIOS[kind]:
        if ours in shown and other in shown:
            rows.append((f"{ours} / {_label(other)}", *(_ratio(case, ours, other, kind) for case in cases)))
    return Table(f"{op}: {what_is_measured(kind, device)}, µs", rows)


def _flat_table(results: Results, kind: str) -> Table:
    """A row for each op and number of tokens, a column for each peer, and for the ratios that matter most."""
    device = results.settings.device
    shown = shown_peers(results.cases, kind, device)
    ratios = [(ours, other) for ours, other in MAIN_RATIOS[kind] if ours in shown and other in shown]
    rows = [("op", "tokens", *map(_label, shown), *(f"{ours} / {other}" for ours, other in ratios))]
    for case in results.cases:
        times = (_microseconds(case.time(peer, kind)) for peer in shown)
        rows.append((case.op, str(case.tokens), *times, *(_ratio(case, *ratio, kind) for ratio in ratios)))
    what = what_is_measured(kind, device)
    return Table(what[0].upper() + what[1:], rows)


def _side_tables(results: Results) -> list[Table]:
    tables = []
    if results.compile_times:
        tables.append(_compile_times_table(results))
    tables.append(_compilations_table(results))
    if any(peer.peak_bytes is not None for case in results.cases for peer in case.peers.values()):
        tables.append(_memory_table(results))
    return tables


def _compile_times_table(results: Results) -> Table:
    columns = list(dict.fromkeys(peer for times in results.compile_times.values() for peer in times))
    rows = [("op", *(f"{peer}, {state}" for peer in columns for state in ("cold", "warm")))]
    for op, times in results.compile_times.items():
        cells = []
        for peer in columns:
            time = times.get(peer)
            cells += [NOTHING, NOTHING] if time is None else [f"{time.cold:.2f}", f"{time.warm:.2f}"]
        rows.append((op, *cells))
    return Table("first call, s, with the cache on disk empty (cold) and full (warm)", rows)


def _compilations_table(results: Results) -> Table:
    columns = list(dict.fromkeys(peer for counts in results.compilations.values() for peer in counts))
    rows = [("op", *columns)]
    rows += [(op, *(str(counts.get(peer, NOTHING)) for peer in columns)) for op, counts in results.compilations.items()]
    return Table(f"compilations for {len(results.settings.tokens)} token counts", rows)


def _memory_table(results: Results) -> Table:
    columns = (EAGER, TORCH_COMPILE, OURS, CODE_ALONE)
    rows: list[tuple[str, ...]] = [("op", "tokens", *columns)]
    for case in results.cases:
        peaks = [case.peers[peer].peak_bytes if peer in case.peers else None for peer in columns]
        rows.append(
            (case.op, str(case.tokens), *(NOTHING if peak is None else f"{peak / 2**20:.3f}" for peak in peaks))
        )
    return Table("peak memory of a call beyond its inputs, MiB", rows)


def _errors(results: Results) -> list[str]:
    tokens_of: dict[str, list[str]] = {}
    for case in results.cases:
        for name, peer in case.peers.items():
            if peer.error is not None:
                tokens_of.setdefault(f"{case.op}: {name}: {peer.error}", []).append(str(case.tokens))
    lines = (f"{error} ({', '.join(tokens)} tokens)" for error, tokens in tokens_of.items())
    return ["\n".join(["not measured", *lines])] if tokens_of else []


def _label(peer: str) -> str:
    return LIMIT if peer == COPY else peer


def _microseconds(value: float | None) -> str:
    return NOTHING if value is None else microseconds(value)


def _ratio(case: CaseResult, ours: str, other: str, kind: str) -> str:
    one, two = case.time(ours, kind), case.time(other, kind)
    return NOTHING if one is None or not two else f"{one / two:.2f}"
