"""What the mode costs the ops that it does not catch: ``python -m benchmarks passthrough``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from . import passthrough_results as results
from . import timing
from .arguments import add_results_arguments, command_parser, measured_or_read, positive
from .passthrough_calls import NO_MODE, PLAIN, comparisons
from .passthrough_results import Results, Row
from .peers import OURS
from .progress import Progress
from .results import describe_machine

ROUNDS = 1000

DESCRIPTION = f"""\
Host time per call of ops that DispatchCompileMode does not catch: outside any mode ("{NO_MODE}"), inside it ("{OURS}"),
and inside a TorchDispatchMode that calls through ("{PLAIN}"). Also of entering and leaving a mode, and of a call that
is caught, beside a TorchDispatchMode that runs the same compiled code. The ways take turns in many short rounds; a
ratio is the median of the rounds' ratios.

Tables go to stdout, progress to stderr.
"""


def main(argv: Sequence[str]) -> int:
    """Run the benchmark, or show the results of an earlier run.

    Returns:
        The exit status.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    found = measured_or_read(parser, options, results.read, lambda device: run(device, options.rounds))
    print(results.markdown(found) if options.markdown else results.text(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("passthrough", DESCRIPTION)
    parser.add_argument("--rounds", type=_rounds, default=ROUNDS, metavar="N", help="default: %(default)s")
    add_results_arguments(parser)
    return parser


def _rounds(text: str) -> int:
    rounds = positive(text)
    if rounds < 2:
        raise argparse.ArgumentTypeError("quartiles need 2 rounds or more")
    return rounds


def run(device: str, rounds: int) -> Results:
    """Measure, on one thread."""
    torch.set_num_threads(1)
    progress = Progress()
    tables: dict[str, list[Row]] = {}
    try:
        with torch.inference_mode(), comparisons(device) as compared:
            progress.expect(rounds * sum(len(comparison.peers) for comparison in compared))
            for comparison in compared:
                timer = timing.HostTimer(device, comparison.batch)
                rows = tables[comparison.title] = []
                for call, peers in comparison.peers.items():
                    progress.show(call)
                    samples = timing.measure(peers, timer, rounds, each_round=progress.step)
                    seconds = {peer.name: samples[peer.name][timing.HOST] for peer in peers}
                    rows.append(Row.of(call, seconds, comparison.ratios))
    finally:
        progress.close()
    return Results(describe_machine(device), device, torch.get_num_threads(), rounds, tables)
