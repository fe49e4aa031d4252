"""The command line of the demo."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from . import moe
from .ir_ops import OWN, VLLM, callable_through_torch, ir_ops
from .run import Checked, Measurement, check, measure, progress, workloads
from .workload import Setup

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = (1, 8, 64, 512)
CPU_SCALE = 8  # a model's worth of experts takes a minute to fill, and 2.4 GB

DESCRIPTION = """\
Two opaque custom ops, written as vLLM writes them, call IR ops in their bodies: a fused MoE with
Qwen3-30B-A3B's shapes, and an MLA decode step with DeepSeek-V3's. Each runs eagerly and under the mode.
The results are compared; the trace, what was compiled, and the time per call go to stdout, progress to stderr.

exit status: 0 if all results agree, 1 if any does not, 2 for arguments that make no sense here
"""


def main(argv: Sequence[str]) -> int:
    """Run the demo.

    Returns:
        The exit status.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    source = VLLM if options.vllm else OWN
    try:
        ir_ops(source)
    except ImportError as error:
        parser.error(f"--vllm: vLLM with vllm.ir is needed, but cannot be imported: {error}")
    scale = options.scale or (CPU_SCALE if device == "cpu" else 1)
    setup = Setup(device, DTYPES[options.dtype], moe.EXPERTS // scale, source)

    with torch.no_grad(), callable_through_torch(source), _compilations_shown():
        progress("filling the weights")
        ops = workloads(setup)
        checked = check(ops, options.tokens)
        print(_trace_report(checked), flush=True)
        for mismatch in checked.mismatches:
            print(f"MISMATCH: {mismatch}", file=sys.stderr)
        if checked.mismatches:
            return 1
        print(_time_report(setup, options.dtype, measure(ops, options.tokens, checked.cache)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dispatch_compile demo",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument(
        "--tokens",
        type=_token_counts,
        default=TOKENS,
        metavar="N,N,...",
        help=f"token counts, 0 is one (default: {','.join(map(str, TOKENS))})",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the activations (default: %(default)s)")
    parser.add_argument(
        "--vllm",
        action="store_true",
        help="take the MLA step's norm and the MoE's activation from the installed vLLM: vllm.ir.ops.rms_norm, "
        "and gelu_and_mul_sparse in place of silu_and_mul, which vllm.ir does not have; quantization stays "
        "this package's",
    )
    parser.add_argument(
        "--scale",
        type=_scale,
        metavar="N",
        help=f"divide the number of experts, {moe.EXPERTS}, by N (default: {CPU_SCALE} on a CPU, else 1)",
    )
    return parser


def _token_counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 1,8,64") from None
    if min(counts) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} has a negative number of tokens")
    return counts


def _scale(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= moe.EXPERTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {moe.EXPERTS}")
    return int(text)


@contextmanager
def _compilations_shown() -> Iterator[None]:
    """The package's log of what it compiles, on stderr."""
    logger = logging.getLogger("dispatch_compile")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("  %(message)s"))
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _trace_report(checked: Checked) -> str:
    stats = checked.cache.stats()
    return f"""\
Trace
{checked.trace}

Compiled
{checked.trace.summary()}
{stats.compiles} compilations of {len(checked.cache)} implementations; {stats.hits} calls ran compiled code
"""


def _time_report(setup: Setup, dtype: str, measurements: Sequence[Measurement]) -> str:
    device = torch.cuda.get_device_name() if setup.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    lines = [
        f"Time per call: torch {torch.__version__}, {device}, {dtype}, {setup.experts} of {moe.EXPERTS} experts",
        f"{'op':<12}{'tokens':>8}{'eager ms':>12}{'mode ms':>12}{'eager/mode':>12}",
    ]
    for each in measurements:
        eager, compiled, ratio = each.eager * 1e3, each.compiled * 1e3, each.eager / each.compiled
        lines.append(f"{each.name:<12}{each.tokens:>8}{eager:>12.3f}{compiled:>12.3f}{ratio:>12.2f}")
    return "\n".join(lines)
