"""The command line that traces a script."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .._compile.config import CompileConfig
from .._trace.trace import Trace
from .late_ops import EarlyMode, entered_early
from .script import Script, own_call_site, own_traceback

INTERRUPTED = 130  # as shells report a process that SIGINT ended

DESCRIPTION = """\
Run a Python script inside a mode, and show what was done with each call of an IR op on its main thread.
IR ops run compiled, or eagerly if they cannot be compiled. Modes that the script enters itself work as
ever, and calls inside them are shown as well. torch is imported before the script starts: what torch reads
from the environment at its import must be set outside.

The trace and its summary go to stderr when the script has ended, however it ends. stdout is the script's own.

exit status: the script's; 1 if it raises, 130 if it is interrupted, 2 for arguments that make no sense here
"""

NO_IR_OPS = "No IR op was called inside {name} on its main thread."
WHY_NO_IR_OPS = """\
 Perhaps
- it uses none: none of vllm.ir, of dispatch_compile.ops, or given to register_op or register_native;
- it calls them on other threads (see dispatch_compile.inherit_modes) or in other processes;
- torch.compile has made them part of a larger compiled whole;
- vLLM's torch wrapping is off (see vllm.ir.enable_torch_wrap)."""


def main(argv: Sequence[str]) -> int:
    """Run a script and show its trace.

    Returns:
        The exit status.

    Raises:
        SystemExit: the script's own.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    script = Script(options.script, options.module, options.arguments)
    reason = script.why_not_found()
    if reason is not None:
        parser.error(reason)
    try:
        trace = Trace(all_ops=options.all, ids=options.ids, stacks=options.stacks, max_events=options.max_events)
        for file in filter(None, (options.json, options.perfetto)):
            file.open("a").close()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    status = 0
    try:
        with entered_early(EarlyMode(config=CompileConfig(on_failure="native"), trace=trace)):
            script.run()
    except SystemExit:
        raise
    except BaseException as error:
        _show(error)
        status = INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    finally:
        for call in trace.calls:
            call.stack = own_call_site(call.stack)
        if not sys.stdout.closed:
            sys.stdout.flush()  # so that both streams are in order where they go to one file
        print(_report(script, trace, ended_early=status != 0), file=sys.stderr)
        if options.json is not None:
            trace.save(options.json)
        if options.perfetto is not None:
            trace.to_perfetto(options.perfetto)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dispatch_compile trace",
        usage="%(prog)s [options] [-m MODULE | SCRIPT] ...",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # argparse looks for abbreviations among the script's own arguments, too
    )
    parser.add_argument("--all", action="store_true", help="show every op that torch runs; each costs microseconds")
    parser.add_argument("--ids", action="store_true", help="number the tensors, to follow the data")
    parser.add_argument("--stacks", action="store_true", help="show where each call comes from")
    parser.add_argument("--max-events", type=int, metavar="N", help="keep the last N calls (default: all)")
    parser.add_argument("--json", type=_absolute, metavar="FILE", help="write the trace as JSON lines")
    parser.add_argument("--perfetto", type=_absolute, metavar="FILE", help="write a timeline for ui.perfetto.dev")
    parser.add_argument("-m", dest="module", action="store_true", help="run a module, as python -m does")
    parser.add_argument("script", metavar="SCRIPT", help="the script, or with -m the module, to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments")
    return parser


def _absolute(path: str) -> Path:
    return Path(path).absolute()  # the script may change the current folder


def _show(error: BaseException) -> None:
    """Print an error of the script as Python does."""
    error.__traceback__ = own_traceback(error)
    if error.__traceback__ is None:  # there is no script to run; what runpy tried before does not matter
        error.__suppress_context__ = True
    sys.excepthook(type(error), error, error.__traceback__)


def _report(script: Script, trace: Trace, *, ended_early: bool) -> str:
    parts = [f"Trace of {script.name}\n{trace}"] if trace.calls or trace.dropped else []
    if trace.events:
        parts.append(f"Summary\n{trace.summary()}")
    elif not trace.dropped:
        parts.append(NO_IR_OPS.format(name=script.name) + ("" if ended_early else WHY_NO_IR_OPS))
    return "\n\n".join(parts)
