"""The command line of ``vllm-bodies``."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from .. import plot
from ..arguments import available, command_parser, positive, token_counts
from ..progress import Progress
from ..results import BadResults
from . import picture, report, results
from .results import BODIES, Results, Settings, Sizes
from .run import run

TOKENS = {"cpu": (1, 4, 16, 64), "cuda": (1, 4, 16, 64, 256, 1024, 4096)}
HIDDEN, INTERMEDIATE, HEADS = 7168, 2048, 128  # DeepSeek-V3's
ROUNDS = 15

DESCRIPTION = """\
Time per call of opaque ops' bodies with vLLM's own layers in them: a fused mixture of experts and a decode step of
multi-head latent attention. Compared are native code run eagerly, what vLLM does today (a torch.compile of its own for
each layer), this package, and the body without its small ops. Each has a process of its own, and they take turns.
A variant that claims to run compiled code must prove it, or it is not timed.

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
        if options.plot is not None:
            plot.check_drawable()
        if options.from_json is not None:
            found = results.read(options.from_json).only(options.bodies)
        else:
            found = _measured(parser, options)
        print((report.markdown if options.markdown else report.text)(found, options.tokens))
        if options.plot is not None:
            picture.draw(found, options.plot)
    except (OSError, BadResults, plot.NoMatplotlib) as error:
        parser.error(str(error))
    return 0


def _measured(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Results:
    device = available(options.device, parser)
    if importlib.util.find_spec("vllm") is None:
        parser.error("it needs vLLM, which is not installed")
    settings = Settings(
        device,
        options.bodies,
        options.tokens or TOKENS[device],
        Sizes(options.hidden, options.intermediate, options.heads),
        options.rounds,
        options.threads,
    )
    progress = Progress()
    try:
        for found in run(settings, progress):
            if options.json is not None:  # after each body: a run takes minutes
                options.json.write_text(found.to_json())
    finally:
        progress.close()
    return found


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("vllm-bodies", DESCRIPTION)
    parser.add_argument(
        "--bodies", type=_bodies, default=BODIES, metavar="BODY,...", help=f"of {', '.join(BODIES)} (default: all)"
    )
    defaults = "; ".join(f"{','.join(map(str, tokens))} on {device}" for device, tokens in TOKENS.items())
    parser.add_argument("--tokens", type=token_counts, metavar="N,N,...", help=f"token counts (default: {defaults})")
    for name, default in (("hidden", HIDDEN), ("intermediate", INTERMEDIATE), ("heads", HEADS)):
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=ROUNDS, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it to FILE.png; needs matplotlib")
    parser.add_argument("--markdown", action="store_true", help="print tables for a document")
    parser.add_argument(
        "--from-json",
        type=Path,
        metavar="FILE",
        help="measure nothing, and show what an earlier run wrote with --json; --bodies and --tokens choose a part",
    )
    return parser


def _bodies(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in BODIES:
            raise argparse.ArgumentTypeError(f"there is no body {name!r}; there are {', '.join(BODIES)}")
    return names
