"""What the commands' arguments have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from .results import BadResults

DEVICES = ("cpu", "cuda")


def positive(text: str) -> int:
    """An argument that counts something; for argparse's ``type``."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def token_counts(text: str) -> tuple[int, ...]:
    """An argument that lists numbers of tokens; for argparse's ``type``."""
    try:
        return tuple(map(positive, text.split(",")))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers from 1 up, like 1,8,64") from None


def available(device: str | None, parser: argparse.ArgumentParser) -> str:
    """The device that ``--device`` names, by default a GPU if there is one; ends the command if it is not there."""
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        parser.error("--device cuda: torch finds no CUDA device")
    return device or ("cuda" if has_cuda else "cpu")


def command_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of ``python -m benchmarks COMMAND``, which has ``--device``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=DEVICES, help="default: cuda if there is one")
    return parser


class Measured(Protocol):
    """What a command found."""

    def to_json(self) -> str: ...


M = TypeVar("M", bound=Measured)


def add_results_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command write what it found, and show what an earlier run wrote; see :func:`measured_or_read`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to FILE")
    parser.add_argument("--markdown", action="store_true", help="print tables for a document")
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE", help="measure nothing, and show what an earlier run wrote with --json"
    )


def measured_or_read(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    read: Callable[[Path], M],
    measure: Callable[[str], M],
) -> M:
    """What ``measure(device)`` finds, or ``read`` in the file of an earlier run; written to a file if asked for.
    Ends the command if a file cannot be read or written."""
    try:
        earlier = options.from_json
        found = read(earlier) if earlier is not None else measure(available(options.device, parser))
        if options.json is not None:
            options.json.write_text(found.to_json())
    except (OSError, BadResults) as error:
        parser.error(str(error))
    return found
