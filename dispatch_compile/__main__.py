"""``python -m dispatch_compile COMMAND ...``: picks the command, imports that command alone, and runs it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    module: str  # has main(arguments) -> exit status
    help: str


COMMANDS = {
    "demo": Command(
        "dispatch_compile.demo.cli",
        "a fused MoE and an MLA decode step as opaque custom ops, eager against compiled",
    ),
    "trace": Command("dispatch_compile.trace_script.cli", "what is done with each call of an IR op in your program"),
    "bench": Command(
        "dispatch_compile.bench.cli",
        "time per call of IR ops in the mode, beside everything that one could use instead",
    ),
    "breakdown": Command("dispatch_compile.bench.breakdown", "where the time of one intercepted call goes"),
    "passthrough": Command("dispatch_compile.bench.passthrough", "what the mode costs the ops that it does not catch"),
    "restart": Command(
        "dispatch_compile.bench.restart", "how soon a process runs compiled code that an earlier one saved"
    ),
    "vllm-bodies": Command(
        "dispatch_compile.bench.vllm_bodies.cli",
        "time per call of opaque ops' bodies with vLLM's layers: eager, as vLLM runs them today, and ours",
    ),
    "numerics": Command(
        "dispatch_compile.bench.numerics", "how far compiled results are from eager ones, and what their bits cost"
    ),
    "soak": Command(
        "dispatch_compile.bench.soak", "many threads, many kinds of calls: is everything right, does it last?"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dispatch_compile",
        description="Run IR ops compiled inside opaque torch custom ops.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name}  {command.help}" for name, command in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS, help="what to run; COMMAND --help says more", metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own arguments", metavar="...")
    given = parser.parse_args(argv)
    status: int = importlib.import_module(COMMANDS[given.command].module).main(given.arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
