"""The results as text: aligned tables for a terminal, or Markdown for a document."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..results import counted, versions_text, where_text
from ..tables import Table, aligned, as_markdown, microseconds
from ..timing import DEVICE, HOST
from .results import EAGER, GRAPH, OURS, REST, TODAY, VARIANTS, CaseResult, Results

NOTHING = "-"
RATIOS = ((OURS, EAGER), (OURS, TODAY))


def text(results: Results, tokens: Collection[int] | None = None) -> str:
    """For a terminal; times at these numbers of tokens, or at all."""
    header = [f"{name:<8}{value}" for name, value in results.machine.items()]
    header.append(f"{'run':<8}{counted(results.settings.rounds, 'round')}; {_sizes(results)}")
    return "\n\n".join(["\n".join(header), *map(aligned, _tables(results, tokens)), *_errors(results)])


def markdown(results: Results, tokens: Collection[int] | None = None) -> str:
    """For a document; times at these numbers of tokens, or at all."""
    caption = f"{title(results)}, {versions_text(results.machine)}. {_sizes(results)}."
    return "\n\n".join([caption, *map(as_markdown, _tables(results, tokens))])


def title(results: Results) -> str:
    """Where it ran, in a line."""
    where = where_text(results.machine, results.settings.threads)
    return f"{where}, vLLM {results.machine['vllm']}, torch {results.machine['torch']}"


def what_is_measured(kind: str, device: str) -> str:
    """A kind of time, for people."""
    if device == "cpu":
        return "time per call"
    return {
        HOST: "host time per call, to issue it",
        DEVICE: "device time per call",
        GRAPH: "device time of a replayed CUDA graph",
    }[kind]


def _sizes(results: Results) -> str:
    sizes = results.settings.sizes
    return f"Hidden size {sizes.hidden}, intermediate size {sizes.intermediate}, {sizes.heads} heads; bfloat16"


def _tables(results: Results, tokens: Collection[int] | None) -> list[Table]:
    cases = [case for case in results.cases if tokens is None or case.tokens in tokens]
    times = (_times(cases, kind, results.settings.device) for kind in results.kinds)
    return [*times, _compile_times(results), _ops(results)]


def _times(cases: Sequence[CaseResult], kind: str, device: str) -> Table:
    ratios = [f"{one} / {other}" for one, other in RATIOS]
    header = ("body", "tokens", *VARIANTS, *ratios, f"the small ops alone, {OURS} / {TODAY}")
    rows = [
        (
            case.body,
            str(case.tokens),
            *(_microseconds(case.time(variant, kind)) for variant in VARIANTS),
            *(_ratio(case.time(one, kind), case.time(other, kind)) for one, other in RATIOS),
            _ratio(_of_small_ops(case, OURS, kind), _of_small_ops(case, TODAY, kind)),
        )
        for case in cases
    ]
    what = what_is_measured(kind, device)
    return Table(f"{what[0].upper()}{what[1:]}, µs", [header, *rows])


def _compile_times(results: Results) -> Table:
    compiling = (TODAY, OURS)
    header = ("body", *(f"{name}, {what}" for what in ("compilations", "s") for name in compiling))
    rows = [
        (
            body,
            *(str(results.compilations.get(body, {}).get(name, NOTHING)) for name in compiling),
            *(_seconds_compiling(results, body, name) for name in compiling),
        )
        for body in results.bodies
    ]
    count = counted(len(results.settings.tokens), "token count")
    return Table(f"Compilations for {count}, and how long the first calls took", [header, *rows])


def _ops(results: Results) -> Table:
    most = {body: max(case.tokens for case in results.cases if case.body == body) for body in results.bodies}
    rows = [
        (case.body, *(_count(case, variant) for variant in VARIANTS))
        for case in results.cases
        if case.tokens == most[case.body]
    ]
    return Table("ATen ops that a call sends through the dispatcher", [("body", *VARIANTS), *rows])


def _seconds_compiling(results: Results, body: str, variant: str) -> str:
    firsts = [case.variants[variant].first_call for case in results.cases if case.body == body]
    return NOTHING if None in firsts else f"{sum(seconds for seconds in firsts if seconds is not None):.1f}"


def _count(case: CaseResult, variant: str) -> str:
    count = case.variants[variant].aten_ops
    return NOTHING if count is None else str(count)


def _of_small_ops(case: CaseResult, variant: str, kind: str) -> float | None:
    whole, rest = case.time(variant, kind), case.time(REST, kind)
    return None if whole is None or rest is None else whole - rest


def _microseconds(value: float | None) -> str:
    return NOTHING if value is None else microseconds(value)


def _ratio(one: float | None, other: float | None) -> str:
    return NOTHING if one is None or not other else f"{one / other:.2f}"


def _errors(results: Results) -> list[str]:
    tokens_of: dict[str, list[str]] = {}
    for case in results.cases:
        for name, one in case.variants.items():
            if one.error is not None:
                tokens_of.setdefault(f"{case.body}: {name}: {one.error}", []).append(str(case.tokens))
    lines = (f"{error} ({', '.join(tokens)} tokens)" for error, tokens in tokens_of.items())
    return ["\n".join(["not measured", *lines])] if tokens_of else []
