"""``python -m dispatch_compile COMMAND ...``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
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
}


def main(argv: Sequence[str] | None = None) -> int:
    return run("dispatch_compile", "Run IR ops compiled inside opaque torch custom ops.", COMMANDS, argv)


def run(package: str, description: str, commands: Mapping[str, Command], argv: Sequence[str] | None) -> int:
    """Pick a command of ``python -m package COMMAND ...``, import that command alone, and run it."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {package}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name}  {command.help}" for name, command in commands.items()),
    )
    parser.add_argument("command", choices=commands, help="what to run; COMMAND --help says more", metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own arguments", metavar="...")
    given = parser.parse_args(argv)
    status: int = importlib.import_module(commands[given.command].module).main(given.arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
