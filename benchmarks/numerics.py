"""How far compiled results are from eager ones, and what their bits cost: ``python -m benchmarks numerics``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch

from dispatch_compile import CompileConfig

from . import numerics_results as results
from . import sweep, sweep_results, sweep_values, timing
from .arguments import add_results_arguments, command_parser, measured_or_read, positive
from .cases import CASES, DTYPES, Case, Inputs, Sizes, tensors
from .measure import unwatched
from .numerics_results import BITWISE, DEFAULT, Results, Row
from .peers import EAGER, Calling, Ours, Peer
from .progress import Progress
from .proof import Broken
from .results import describe_machine
from .ulps import Distance

TOKENS = (7, 1024)
HIDDEN = 4096
ROUNDS = 9

DESCRIPTION = """\
What share of the results of compiled code have the bits of the eager ones, how far apart the others are, in units in
the last place (ULPs) of the result's dtype, and how long the calls take: with CompileConfig() and with
CompileConfig(bitwise=True), over the ops that ship with the package, for inputs of unit size and for rough ones
(all magnitudes, subnormal numbers, zeros of both signs, infinities, NaN).

With --ops, instead: all ops that Inductor has code of its own for, or those named, over dtypes and special values
(zeros of both signs, subnormal numbers, extremes, infinities, NaN, ties, the limits of integers). What differs by more
than rounding is listed, with an example.

The table goes to stdout, progress to stderr.
"""
ALL = "all"


def main(argv: Sequence[str]) -> int:
    """Measure, or show the results of an earlier run.

    Returns:
        The exit status.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.ops is not None:
        names = None if options.ops == [ALL] else options.ops
        swept = measured_or_read(
            parser,
            options,
            sweep_results.read,
            lambda device: sweep.run(device, names, options.dtypes, options.every, options.jobs),
        )
        print(sweep_results.markdown(swept) if options.markdown else sweep_results.text(swept))
        return 0
    found = measured_or_read(parser, options, results.read, lambda device: run(device, options.hidden))
    print(results.markdown(found) if options.markdown else results.text(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("numerics", DESCRIPTION)
    parser.add_argument(
        "--hidden", type=positive, default=HIDDEN, metavar="N", help="the inputs' width (default: %(default)s)"
    )
    parser.add_argument(
        "--ops", type=_names, metavar="NAMES", help=f"sweep over ATen ops: {ALL}, or names like expm1,floor_divide"
    )
    parser.add_argument(
        "--dtypes",
        type=_dtypes,
        default=list(sweep_values.DTYPES),
        metavar="NAMES",
        help=f"of the sweep (default: {','.join(sweep_values.DTYPES)})",
    )
    parser.add_argument(
        "--every", type=positive, default=1, metavar="N", help="make every Nth call of the sweep (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="processes of the sweep, one dtype each (default: 1)"
    )
    add_results_arguments(parser)
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - {ALL, *sweep.op_names()}
    if unknown:
        raise argparse.ArgumentTypeError(f"Inductor has no code of its own for {', '.join(sorted(unknown))}")
    return names


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - set(sweep_values.DTYPES)
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not among {', '.join(sweep_values.DTYPES)}")
    return names


def run(device: str, hidden: int) -> Results:
    """Measure every case in every dtype, on one CPU thread."""
    torch.set_num_threads(1)
    progress = Progress()
    progress.expect(len(CASES) * len(DTYPES))
    rows = []
    try:
        with torch.inference_mode():
            for name, case in CASES.items():
                for dtype in DTYPES:
                    progress.show(f"{name}, {dtype}")
                    rows.append(_row(case, dtype, device, hidden))
                    progress.step()
    finally:
        progress.close()
    return Results(describe_machine(device), device, torch.get_num_threads(), TOKENS, hidden, tuple(rows))


def _row(case: Case, dtype: str, device: str, hidden: int) -> Row:
    with unwatched(case) as eager:
        ways = [Ours(DEFAULT, case.op), Ours(BITWISE, case.op, CompileConfig(bitwise=True))]
        sizes = [Sizes(tokens, hidden, DTYPES[dtype], device) for tokens in TOKENS]
        distances = {
            way.name: {
                kind: Distance.greatest(_distances(way, eager.torch_op, case, map(inputs, sizes)))
                for kind, inputs in results.KINDS_OF_INPUTS.items()
            }
            for way in ways
        }
        rotation = [case.arguments(Inputs(sizes[-1]))]
        times = _times([way.peer(rotation) for way in (Calling(EAGER, eager.torch_op), *ways)], device)
    return Row(case.op.name, dtype, distances, times)


def _distances(way: Ours, eager: Callable[..., Any], case: Case, inputs: Iterator[Inputs]) -> Iterator[Distance]:
    for make in inputs:
        arguments = case.arguments(make)
        expected, hits = tensors(eager(*arguments)), way.mode.cache.stats().hits
        with way.mode:
            actual = tensors(way.op.torch_op(*arguments))
        if way.mode.cache.stats().hits != hits + 1:
            raise Broken(f"{way.name}: {case.op.name} did not run compiled")
        yield Distance.between(actual, expected)


def _times(peers: Sequence[Peer], device: str) -> dict[str, dict[str, float]]:
    """Microseconds per call, medians, by kind of time and peer."""
    samples = timing.measure(peers, timing.timer(device), ROUNDS, each_round=lambda: None)
    kinds = samples[EAGER]
    return {kind: {peer.name: round(median(samples[peer.name][kind]) * 1e6, 3) for peer in peers} for kind in kinds}
