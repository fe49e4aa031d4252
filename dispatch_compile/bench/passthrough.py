"""What the mode costs the ops that it does not catch: ``python -m dispatch_compile passthrough``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from . import passthrough_results as results
from . import timing
from .arguments import DEVICES, available, positive
from .passthrough_calls import NO_MODE, PLAIN, comparisons
from .passthrough_results import Results, Row
from .peers import OURS
from .progress import Progress
from .results import BadResults, describe_machine

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
    try:
        if options.from_json is not None:
            found = results.read(options.from_json)
        else:
            found = run(available(options.device, parser), options.rounds)
        if options.json is not None:
            options.json.write_text(found.to_json())
    except (OSError, BadResults) as error:
        parser.error(str(error))
    print(results.markdown(found) if options.markdown else results.text(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dispatch_compile passthrough",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=DEVICES, help="default: cuda if there is one")
    parser.add_argument("--rounds", type=_rounds, default=ROUNDS, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to FILE")
    parser.add_argument("--markdown", action="store_true", help="print tables for a document")
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE", help="measure nothing, and show what an earlier run wrote with --json"
    )
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
