"""The version of the package, and a look at that of torch before anything of torch is used."""

from __future__ import annotations

import torch

__version__ = "0.1.0"
OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 15)


def check_torch(version: str) -> None:
    """Refuse a torch whose insides, which the package uses, are not known.

    Raises:
        ImportError: it is older or newer than those that the package is tested with; the text says which these are.
    """
    if not OLDEST_TORCH <= tuple(map(int, version.split(".")[:2])) <= NEWEST_TORCH:
        oldest, newest = ("{}.{}".format(*each) for each in (OLDEST_TORCH, NEWEST_TORCH))
        raise ImportError(
            f"dispatch_compile {__version__} works with torch {oldest} to {newest}, and this is torch {version}: "
            f"install one of these, or another dispatch_compile"
        )


check_torch(torch.__version__)
