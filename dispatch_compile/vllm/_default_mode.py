"""The mode for the threads that have entered none."""

from __future__ import annotations

from .._mode import DispatchCompileMode

mode: DispatchCompileMode | None = None  # set by enable()
