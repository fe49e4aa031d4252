"""vLLM: its IR ops and its ``CustomOp`` layers, caught by modes, and one line that turns it all on in a process.

Nothing here imports vLLM before it is used. What is read of vLLM beyond its documented surface is named where it is
read; a vLLM that has changed there is met with an error that says what is missing (see ``_required.py``).
"""

from ._custom_ops import catch_custom_ops
from ._ir_ops import ir_ops, ir_ops_called_through_torch, registered_ir_ops
from ._process import disable, enable, plugin

__all__ = [
    "catch_custom_ops",
    "disable",
    "enable",
    "ir_ops",
    "ir_ops_called_through_torch",
    "plugin",
    "registered_ir_ops",
]
