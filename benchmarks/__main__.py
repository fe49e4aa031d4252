"""``python -m benchmarks COMMAND ...``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dispatch_compile.__main__ import Command, run

COMMANDS = {
    "ops": Command("benchmarks.ops", "time per call of IR ops in the mode, beside all that one could use instead"),
    "breakdown": Command("benchmarks.breakdown", "where the time of one intercepted call goes"),
    "passthrough": Command("benchmarks.passthrough", "what the mode costs the ops that it does not catch"),
    "restart": Command("benchmarks.restart", "how soon a process runs compiled code that an earlier one saved"),
    "vllm-bodies": Command(
        "benchmarks.vllm_bodies.cli",
        "time per call of opaque ops' bodies with vLLM's layers: eager, as vLLM runs them today, and ours",
    ),
    "numerics": Command("benchmarks.numerics", "how far compiled results are from eager ones, and what bits cost"),
    "soak": Command("benchmarks.soak", "many threads, many kinds of calls: is everything right, does it last?"),
}


def main(argv: Sequence[str] | None = None) -> int:
    return run("benchmarks", "Measure dispatch_compile. Run it in the repository's root.", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
