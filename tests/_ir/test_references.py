"""A reference implementation that gives something else than its op is told of, and never takes its place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dispatch_compile as dc

EAGER = dc.CompileConfig(backend="eager")


def twice(x: Tensor) -> Tensor:
    return x * 2


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    return x * 2, x.sum(-1)


def in_double(x: Tensor) -> Tensor:
    return x.double() * 2


def summed(x: Tensor) -> Tensor:
    return (x * 2).sum(-1)


def in_columns(x: Tensor) -> Tensor:
    return (x * 2).t().contiguous().t()


def in_a_tuple(x: Tensor) -> Tensor:
    return (x * 2,)


def nothing(x: Tensor) -> Tensor:
    return None


def one_too_many(x: Tensor) -> tuple[Tensor, Tensor]:
    return x * 2, x.sum(-1), x


def swapped(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sum(-1), x * 2


OWN = "torch.float32 of shape [4, 8] and strides [8, 1] on cpu"
SUMS = "torch.float32 of shape [4] and strides [1] on cpu"
WRONG = [
    (twice, in_double, f"{OWN.replace('32', '64')} where the op itself gives {OWN}"),
    (twice, summed, f"{SUMS} where the op itself gives {OWN}"),
    (twice, in_columns, f"{OWN.replace('[8, 1]', '[1, 4]')} where the op itself gives {OWN}"),
    (twice, in_a_tuple, f"1 results ({OWN}) where the op itself gives {OWN}"),
    (twice, nothing, f"NoneType where the op itself gives {OWN}"),
    (parts, one_too_many, f"3 results ({OWN}; {SUMS}; {OWN}) where the op itself gives 2 results ({OWN}; {SUMS})"),
    (parts, swapped, f"2 results ({SUMS}; {OWN}) where the op itself gives 2 results ({OWN}; {SUMS})"),
]


@pytest.mark.parametrize("on_failure", ["native", "raise"])
@pytest.mark.parametrize("fake", [True, False])
@pytest.mark.parametrize(("body", "reference", "told"), WRONG)
def test_an_error_names_both_layouts(body, reference, told, fake, on_failure, define_opaque):
    op = define_opaque(body, fake=body, key="CompositeExplicitAutograd" if fake else "CPU")
    handle = dc.register_native(op, reference)
    mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", on_failure=on_failure))
    try:
        with mode:
            for _ in range(2):
                with pytest.raises(dc.CompileError) as error:
                    op(torch.randn(4, 8))
                assert str(error.value) == (
                    f"the reference implementation of {op.name()} gives {told}; mend what was given to register_native"
                )
        assert mode.cache.stats().compiles == 0
    finally:
        handle.remove()


def unlike(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float64)


@pytest.mark.parametrize("fake", [twice, unlike, None], ids=["right fake", "wrong fake", "no fake"])
def test_a_reference_that_does_as_the_op_is_compiled(fake, define_opaque):
    """Also if the fake kernel is wrong or missing: then it is what the op's own kernel gives that counts."""
    runs = []

    def body(x: Tensor) -> Tensor:
        runs.append(type(x))
        return x.mul(2)

    op = define_opaque(body, fake=fake, key="CPU")
    handle = dc.register_native(op, twice)
    mode, x = dc.DispatchCompileMode(config=EAGER), torch.randn(4, 8)
    try:
        with mode:
            for _ in range(2):
                assert torch.equal(op(x), x * 2)
        assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 2)
        assert len(runs) == (0 if fake is twice else 1)
    finally:
        handle.remove()


def test_an_error_of_the_op_comes_out_as_without_a_mode(define_opaque):
    def fails(x: Tensor) -> Tensor:
        raise KeyError("mine")

    op = define_opaque(fails, key="CPU")
    handle = dc.register_native(op, twice)
    try:
        with dc.DispatchCompileMode(config=EAGER), pytest.raises(KeyError, match="mine"):
            op(torch.randn(4, 8))
    finally:
        handle.remove()


def test_each_specialization_is_looked_at(define_opaque):
    def rows(x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 1 else x.double() * 2

    op = define_opaque(rows)
    handle = dc.register_native(op, twice)
    mode = dc.DispatchCompileMode(config=EAGER)
    try:
        with mode:
            op(torch.randn(4, 8))
            with pytest.raises(dc.CompileError, match=r"gives torch.float32 of shape \[1, 8\].*gives torch.float64"):
                op(torch.randn(1, 8))
            op(torch.randn(4, 8))
        assert mode.cache.stats().hits == 2
    finally:
        handle.remove()
