"""What the sweep found: where compiled results differ from eager ones by more than rounding, as JSON and as tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .results import describe_machine, json_text, read_json, versions_text, where_text
from .sweep_cases import ORDER, Variant
from .tables import Table, aligned, as_markdown
from .ulps import Distance

SCHEMA = "sweep 1"
DEFAULT, BITWISE = "default", "bitwise"
# What counts as rounding: so many units in the last place of the element, and for what is summed, of the result's
# largest element.
ULPS, ULPS_OF_SUMS = 4, 16


@dataclass(frozen=True)
class Difference:
    """Between compiled results and eager ones.

    Attributes:
        elements: how many there are.
        different: how many of them have different bits. A NaN is as good as any other.
        ulps: by how many units in the last place at most, of those where both are finite.
        faults: how many differ by more than rounding, by the way in which they do.
        example: of the largest difference, or why there is no result.
    """

    elements: int
    different: int
    ulps: float
    faults: Mapping[str, int]
    example: str


@dataclass(frozen=True)
class Row:
    """A call. ``arguments`` are those that are not tensors."""

    op: str
    arguments: str
    dtype: str
    config: str
    found: Difference


@dataclass(frozen=True)
class Summary:
    """How many calls there were in a configuration and dtype: with equal bits, with rounding, with more."""

    config: str
    dtype: str
    calls: int
    equal: int
    rounding: int
    more: int

    @staticmethod
    def of(config: str, dtype: str, found: Sequence[Difference]) -> Summary:
        more = sum(is_more(config, each) for each in found)
        equal = sum(not each.different and not each.faults for each in found)
        return Summary(config, dtype, len(found), equal, len(found) - equal - more, more)


@dataclass(frozen=True)
class Sweep:
    """All that a run found.

    Attributes:
        machine: what it ran on, by what a person calls it.
        ops: how many were called.
        left_out: how many ops that Inductor has code for were not, by the reason.
        more: the calls whose results differ by more than the configuration allows.
    """

    machine: Mapping[str, str]
    device: str
    ops: int
    seconds: int
    left_out: Mapping[str, int]
    summaries: tuple[Summary, ...]
    more: tuple[Row, ...]

    @staticmethod
    def of(device: str, ops: int, seconds: float, left_out: Mapping[str, int], rows: Sequence[Row]) -> Sweep:
        kinds = dict.fromkeys((row.config, row.dtype) for row in rows)
        by_kind = {kind: [row.found for row in rows if (row.config, row.dtype) == kind] for kind in kinds}
        summaries = tuple(Summary.of(*kind, found) for kind, found in by_kind.items())
        more = tuple(row for row in rows if is_more(row.config, row.found))
        return Sweep(describe_machine(device), device, ops, round(seconds), left_out, summaries, more)

    def to_json(self) -> str:
        return json_text(SCHEMA, asdict(self))


def is_more(config: str, found: Difference) -> bool:
    """Whether a call differs by more than rounding, or in any bit if it may not."""
    return bool(found.faults or (config == BITWISE and found.different))


def read(path: Path) -> Sweep:
    """The results in a JSON file; raises as :func:`read_json` does."""
    return read_json(path, SCHEMA, _sweep)


def _sweep(data: dict[str, Any]) -> Sweep:
    summaries = tuple(Summary(**summary) for summary in data["summaries"])
    more = tuple(Row(**{**row, "found": Difference(**row["found"])}) for row in data["more"])
    rest = (data["machine"], data["device"], data["ops"], data["seconds"], data["left_out"])
    return Sweep(*rest, summaries, more)


def failure(reason: str) -> Difference:
    """For a call that could not be compared."""
    return Difference(0, 0, 0, {"failure": 1}, reason)


def difference(
    call: Variant, inputs: Sequence[Tensor], actual: Sequence[Tensor], expected: Sequence[Tensor]
) -> Difference:
    """Between a call's results, compiled and eager."""
    elements = different = 0
    ulps = worst = 0
    faults: Counter[str] = Counter()
    example = ""
    for one, other in zip(actual, expected, strict=True):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return failure(f"{one.dtype} of shape {list(one.shape)} for {other.dtype} of shape {list(other.shape)}")
        one, other = one.cpu().contiguous(), other.cpu().contiguous()
        apart = Distance.apart(one, other)
        if not one.numel():
            continue
        elements += one.numel()
        different += int(apart.count_nonzero())
        ulps = max(ulps, int((apart * (one.double().isfinite() & other.double().isfinite())).max()))
        cancelled = None if call.cancels is None else call.cancels(inputs[0].cpu())
        faults += Counter(dict(faults_of(one, other, call.kind == ORDER, cancelled)))
        if int(apart.max()) > worst:
            worst, at = int(apart.max()), int(apart.argmax())
            given = [tensor.cpu().flatten()[at].item() for tensor in inputs if tensor.shape == one.shape]
            arguments = f"of {', '.join(f'{value:.6g}' for value in given)} " if given else ""
            example = f"{arguments}{one.flatten()[at].item():.6g} for {other.flatten()[at].item():.6g}"
    return Difference(elements, different, ulps, dict(faults), example)


def faults_of(
    actual: Tensor, expected: Tensor, sums: bool = False, cancelled: Tensor | None = None
) -> Iterator[tuple[str, int]]:
    """How many elements differ by more than rounding, by the way in which they do: in NaN, infinity, the sign of
    zero, as integers, or in units in the last place.

    Args:
        sums: whether they are sums, which depend on their order.
        cancelled: the numbers of which they are small differences, computed in float32 at least: units of theirs count.
    """
    apart = Distance.apart(actual, expected)
    masks: dict[str, Tensor]
    if not actual.dtype.is_floating_point:
        masks = {"integer": apart > 0}
    else:
        one, other = actual.double(), expected.double()
        nan, zeros = one.isnan() != other.isnan(), (one == 0) & (other == 0)
        infinite = (apart > ULPS) & (one.isinf() | other.isinf())  # the largest number may be rounded to infinity
        masks = {"NaN": nan, "infinity": infinite & ~nan, "sign of zero": zeros & (apart > 0)}
        masks["ULPs"] = (apart > ULPS) & ~nan & ~infinite & ~zeros
        if sums:
            largest = float(other.nan_to_num(0, 0, 0).abs().max()) if other.numel() else 0.0
            del masks["sign of zero"]
            masks["ULPs"] &= (one - other).abs() > ULPS_OF_SUMS * torch.finfo(actual.dtype).eps * largest
        if cancelled is not None:
            eps = min(torch.finfo(actual.dtype).eps, torch.finfo(torch.float32).eps)
            masks["ULPs"] &= (one - other).abs() > ULPS * eps * cancelled.double()
    return ((way, int(mask.sum())) for way, mask in masks.items() if bool(mask.any()))


def text(sweep: Sweep) -> str:
    """For a terminal."""
    header = [f"{name:<8}{value}" for name, value in sweep.machine.items()]
    return "\n\n".join(["\n".join(header), *map(aligned, _tables(sweep)), _left_out(sweep)])


def markdown(sweep: Sweep) -> str:
    """For a document."""
    versions = f"torch {sweep.machine['torch']}, {versions_text(sweep.machine)}"
    where = f"{where_text(sweep.machine, 1)}, {versions}; it took {math.ceil(sweep.seconds / 60)} minutes."
    return "\n\n".join([where, *map(as_markdown, _tables(sweep)), _left_out(sweep)])


def _tables(sweep: Sweep) -> list[Table]:
    rows: list[tuple[str, ...]] = [("configuration", "dtype", "calls", "equal", "rounding", "more")]
    for found in sweep.summaries:
        counts = map(str, (found.calls, found.equal, found.rounding, found.more))
        rows.append((found.config, found.dtype, *counts))
    tables = [Table(f"Calls of {sweep.ops} ops: how many have eager's bits, differ by rounding, or by more", rows)]
    if sweep.more:
        header = ("op", "arguments", "dtype", "configuration", "how", "example")
        tables.append(Table("What differs by more", [header, *map(_faulty, sweep.more)]))
    return tables


def _faulty(row: Row) -> tuple[str, ...]:
    share = row.found.different / max(1, row.found.elements)
    how = ", ".join(row.found.faults) or f"{share:.2g} of the elements, {row.found.ulps:.0f} ULPs"
    return row.op, row.arguments, row.dtype, row.config, how, row.found.example.replace("\n", " ").replace("|", "/")


def _left_out(sweep: Sweep) -> str:
    reasons = (f"{count} {reason}" for reason, count in sorted(sweep.left_out.items(), key=lambda item: -item[1]))
    return f"Left out, of the ops that Inductor has code for: {'; '.join(reasons)}."
