"""Hooks are shared and counted, also when garbage collection releases some while others are acquired."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dispatch_compile._dispatch import hooks as _hooks
from dispatch_compile._torch.dispatch import has_kernel


def passing_on(overload):
    def kernel(keyset, *args, **kwargs):
        return _hooks.redispatch(overload, keyset, args, kwargs)

    return kernel


@pytest.fixture
def two_ops(define_opaque):
    def first(x: Tensor) -> Tensor:
        return x + 1

    def second(x: Tensor) -> Tensor:
        return x + 2

    return define_opaque(first), define_opaque(second)


def test_the_last_release_takes_the_kernel_away(two_ops):
    op, _ = two_ops
    _hooks.acquire([op], passing_on)
    _hooks.acquire([op], passing_on)
    _hooks.release([op])
    assert has_kernel(op, "BackendSelect")
    torch.testing.assert_close(op(torch.zeros(2)), torch.ones(2))
    _hooks.release([op])
    assert not has_kernel(op, "BackendSelect")


def test_a_release_in_the_middle_of_acquiring(two_ops):
    """As when garbage collection frees the only other mode at that moment."""
    first, second = two_ops
    _hooks.acquire([first, second], passing_on)

    def releasing(overload):
        raise AssertionError("both hooks exist already")

    class Overloads:
        def __iter__(self):
            yield first
            _hooks.release([first, second])  # the finalizer of the mode that held both
            yield second

    _hooks.acquire(Overloads(), releasing)
    assert has_kernel(first, "BackendSelect")
    assert has_kernel(second, "BackendSelect")
    _hooks.release([first, second])
    assert not has_kernel(first, "BackendSelect")
    assert not has_kernel(second, "BackendSelect")
