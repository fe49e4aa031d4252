"""A progress bar on stderr; where nobody watches it, a line for each new thing that is done."""

from __future__ import annotations

import sys
import time

WIDTH = 30
SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """How much of the work is done, and what is being done."""

    def __init__(self) -> None:
        self._total = self._done = 0
        self._what = ""
        self._start = time.monotonic()
        self._last_line = float("-inf")
        self._live = sys.stderr.isatty()

    def expect(self, steps: int) -> None:
        """There are this many steps more to do."""
        self._total += steps

    def step(self) -> None:
        """One of them is done."""
        self._done += 1
        self._draw()

    def show(self, what: str) -> None:
        """Say what is being done."""
        self._what = what
        self._draw()

    def note(self, text: str) -> None:
        """Say something that stays."""
        print(f"{self._clear}{text}", file=sys.stderr, flush=True)
        self._draw()

    def close(self) -> None:
        """Take the bar away."""
        if self._live:
            print(self._clear, end="", file=sys.stderr, flush=True)

    @property
    def _clear(self) -> str:
        return "\r\033[K" if self._live else ""

    def _draw(self) -> None:
        seconds = time.monotonic() - self._start
        if not self._live and seconds - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = seconds
        share = self._done / max(1, self._total)
        bar = "#" * int(share * WIDTH)
        line = f"[{bar:<{WIDTH}}] {share:4.0%} {seconds:4.0f} s  {self._what}"
        print(f"{self._clear}{line}", end="" if self._live else "\n", file=sys.stderr, flush=True)
