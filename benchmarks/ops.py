"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from . import handwritten, measure, plot, report, results
from .arguments import available, command_parser, positive, token_counts
from .cases import CASES, DEFAULT_OPS, DTYPES
from .progress import Progress
from .results import BadResults, Results, Settings

TOKENS = {"cpu": (1, 4, 64, 1024), "cuda": (1, 8, 64, 512, 4096, 16384)}
HIDDEN = 4096

DESCRIPTION = """\
Time per call of IR ops inside DispatchCompileMode, and of all that one could use instead: the eager op,
torch.compile in a dispatch mode, handwritten kernels, the compiled code without interception, and a bare
copy of as many bytes, which is the limit. All are measured in one run, in rounds that they take turns in.
A peer that claims to run compiled code must prove it, or it is not timed.

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
        found = _read(options) if options.from_json is not None else _measured(parser, options)
        if options.json is not None:
            options.json.write_text(found.to_json())
        print(report.markdown(found) if options.markdown else report.text(found))
        if options.plot is not None:
            plot.draw(found, options.plot)
    except (OSError, BadResults, plot.NoMatplotlib) as error:
        parser.error(str(error))
    return 0


def _read(options: argparse.Namespace) -> Results:
    found = results.read(options.from_json)
    return found.only(options.ops, options.tokens)


def _measured(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Results:
    device = available(options.device, parser)
    if options.vllm_kernels is not None and device != "cuda":
        parser.error("--vllm-kernels: they need --device cuda")
    ops = options.ops or DEFAULT_OPS
    for op in ops:
        multiple = CASES[op].hidden_multiple
        if options.hidden % multiple:
            parser.error(f"--hidden {options.hidden}: {op} needs a multiple of {multiple}")
    if options.threads is not None or device == "cpu":
        torch.set_num_threads(options.threads or 1)
    settings = Settings(
        device,
        ops,
        options.tokens or TOKENS[device],
        options.hidden,
        options.dtype,
        torch.get_num_threads(),
        not options.no_compile_times,
    )
    if options.vllm_kernels is not None:
        handwritten.load(options.vllm_kernels)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    progress = Progress()
    try:
        return measure.run(settings, options.vllm_kernels is not None, progress)
    finally:
        progress.close()


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("ops", DESCRIPTION)
    parser.add_argument(
        "--ops",
        type=_ops,
        metavar="OP,OP,...",
        help=f"of {', '.join(CASES)} (default: {','.join(DEFAULT_OPS)})",
    )
    defaults = "; ".join(f"{','.join(map(str, tokens))} on {device}" for device, tokens in TOKENS.items())
    parser.add_argument("--tokens", type=token_counts, metavar="N,N,...", help=f"token counts (default: {defaults})")
    parser.add_argument(
        "--hidden", type=positive, default=HIDDEN, metavar="N", help="the inputs' width (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the inputs (default: %(default)s)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: 1 on cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it to FILE.png; needs matplotlib")
    parser.add_argument("--markdown", action="store_true", help="print tables for a document")
    parser.add_argument("--no-compile-times", action="store_true", help="do not measure how long first calls take")
    parser.add_argument(
        "--vllm-kernels", metavar="PATH.so", help="vLLM's kernels, _C_stable_libtorch.abi3.so of its wheel, as a peer"
    )
    parser.add_argument(
        "--from-json",
        type=Path,
        metavar="FILE",
        help="measure nothing, and show what an earlier run wrote with --json; --ops and --tokens choose a part of it",
    )
    return parser


def _ops(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in CASES:
            close = difflib.get_close_matches(name, CASES, n=1)
            suggestion = f"did you mean {close[0]}?" if close else f"there are {', '.join(CASES)}"
            raise argparse.ArgumentTypeError(f"there is no op {name!r}; {suggestion}")
    return names
