"""What the commands' arguments have in common."""

from __future__ import annotations

import argparse

import torch

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
