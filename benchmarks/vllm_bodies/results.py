"""What ``vllm-bodies`` found, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..results import BadResults, Times, json_text, read_json

SCHEMA = "vllm bodies 1"

# The bodies, by name; ``bodies`` has the code, which needs vLLM.
BODIES = ("fused_moe_per_token", "fused_moe_per_group", "mla_decode", "mla_decode_with_norms")

# The ways to run the small ops of a body, by name; ``variants`` has the code.
EAGER, TODAY, OURS, REST = "eager", "vLLM today", "ours", "without the small ops"
VARIANTS = (EAGER, TODAY, OURS, REST)

GRAPH = "graph"  # the kind of time of a replayed CUDA graph, on the device


@dataclass(frozen=True)
class Sizes:
    """Of the bodies: the width of tokens and of an expert, and the number of attention heads."""

    hidden: int
    intermediate: int
    heads: int


@dataclass(frozen=True)
class Settings:
    """What was asked for."""

    device: str
    bodies: tuple[str, ...]
    tokens: tuple[int, ...]
    sizes: Sizes
    rounds: int
    threads: int


@dataclass(frozen=True)
class VariantResult:
    """One way to run a body at a number of tokens.

    Attributes:
        times: by kind, ``"host"``, ``"device"`` or ``"graph"``; empty after an error.
        first_call: seconds until the result of the first call with that many tokens, on an empty cache.
        aten_ops: how many ATen ops that compute something a call sends through the dispatcher.
        difference: the largest of the results' distances from those of the eager body, relative to their norm; None if
            that was not measured.
        error: why it was not measured.
    """

    times: Mapping[str, Times] = field(default_factory=dict)
    first_call: float | None = None
    aten_ops: int | None = None
    difference: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class CaseResult:
    """A body at a number of tokens."""

    body: str
    tokens: int
    variants: Mapping[str, VariantResult]

    def time(self, variant: str, kind: str) -> float | None:
        """The median in microseconds; None if the variant was not measured."""
        result = self.variants.get(variant)
        times = result.times.get(kind) if result is not None else None
        return None if times is None else times.median


@dataclass(frozen=True)
class Results:
    """All that a run found.

    Attributes:
        machine: what it ran on, by what a person calls it.
        cases: in the order of the run.
        compilations: how many each variant needed for all token counts, by body and variant.
    """

    machine: Mapping[str, str]
    settings: Settings
    cases: tuple[CaseResult, ...]
    compilations: Mapping[str, Mapping[str, int]]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of time that were measured."""
        return tuple(dict.fromkeys(kind for case in self.cases for one in case.variants.values() for kind in one.times))

    @property
    def bodies(self) -> tuple[str, ...]:
        """The bodies that were measured."""
        return tuple(dict.fromkeys(case.body for case in self.cases))

    def only(self, bodies: tuple[str, ...]) -> Results:
        """The part on these bodies."""
        cases = tuple(case for case in self.cases if case.body in bodies)
        if not cases:
            raise BadResults(f"these results have nothing on {', '.join(bodies)}")
        return replace(self, cases=cases)

    def to_json(self) -> str:
        return json_text(SCHEMA, asdict(self))


def read(path: Path) -> Results:
    """The results in a JSON file; raises as ``read_json`` does."""
    return read_json(path, SCHEMA, _results)


def _results(data: dict[str, Any]) -> Results:
    given = data["settings"]
    settings = Settings(
        **{
            **given,
            "bodies": tuple(given["bodies"]),
            "tokens": tuple(given["tokens"]),
            "sizes": Sizes(**given["sizes"]),
        }
    )
    cases = tuple(
        CaseResult(case["body"], case["tokens"], {name: _variant_result(one) for name, one in case["variants"].items()})
        for case in data["cases"]
    )
    return Results(data["machine"], settings, cases, data["compilations"])


def _variant_result(data: dict[str, Any]) -> VariantResult:
    times = {kind: Times(each["median"], tuple(each["rounds"])) for kind, each in data["times"].items()}
    return VariantResult(**{**data, "times": times})
