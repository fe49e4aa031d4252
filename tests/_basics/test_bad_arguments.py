"""What public functions refuse, in a sentence of their own, where the mistake was made."""

from __future__ import annotations

import functools
import inspect
import re

import pytest
import torch
from support import EAGER
from torch import Tensor

import dispatch_compile as dc

X = torch.ones(4, 3)


def scaled(x: Tensor, s: float = 1.0) -> Tensor:
    return x * s


class Layer(torch.nn.Module):
    def forward_native(self, x: Tensor) -> Tensor:
        return x


NOT_IMPLEMENTATIONS = [
    (3, "3 is not a function"),
    (Layer, "is not a function"),
    (torch.compile(scaled), "is compiled by torch.compile already; give the function that it was made of"),
    (Layer().forward_native, "depends on the object that it is a method of; give a function of tensors"),
    (functools.partial(scaled, s=2.0), "has no type hints of its own; write a function that calls it"),
    (torch.relu, "is not a Python function; write one that calls it"),
]


@pytest.mark.parametrize(("fn", "text"), NOT_IMPLEMENTATIONS)
def test_what_is_no_implementation(fn, text, define_ir_op, define_opaque):
    op, opaque = define_ir_op(scaled), define_opaque(scaled)
    for register in (
        dc.register_op,
        dc.register_op(name="refused"),
        op.register_impl("vendor"),
        functools.partial(dc.register_native, opaque),
    ):
        if inspect.ismethod(fn) and isinstance(register, functools.partial):
            continue  # a reference may be a method
        with pytest.raises(TypeError, match=re.escape(text)):
            register(fn)
    assert "refused" not in dc.IrOp.registry
    assert list(op.impls) == ["native"]


@pytest.mark.parametrize(
    ("activations", "error", "text"),
    [
        ("xg", TypeError, "activations is a list of names; write ['xg']"),
        (3, TypeError, "activations must be a list of names, not 3"),
        ([0], TypeError, "activations must be strings, not 0"),
        (["y"], ValueError, "activations ['y'] are not among the parameters ['x', 's']"),
        (["x", "s"], ValueError, "activation 's' is no tensor: its type is float"),
    ],
)
def test_activations(activations, error, text, define_opaque):
    with pytest.raises(error, match=re.escape(text)):
        dc.register_op(name="refused", activations=activations)(scaled)
    with pytest.raises(error, match=re.escape(text)):
        dc.register_native(define_opaque(scaled), scaled, activations=activations)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"provider": 3}, "provider name must be a string, not 3"),
        ({"provider": "p", "supported": lambda: False}, "p: supported must be True or False, not <function"),
        ({"provider": "p", "inplace": "no"}, "p: inplace must be True or False, not 'no'"),
        ({"provider": "p", "supports_args": True}, "supports_args of 'p' must be a function, not True"),
    ],
)
def test_implementations(arguments, text, define_ir_op):
    with pytest.raises(TypeError, match=re.escape(text)):
        define_ir_op(scaled).register_impl(**arguments)


def test_ops():
    with pytest.raises(TypeError, match="op name must be a string, not 3"):
        dc.register_op(name=3)(scaled)
    with pytest.raises(TypeError, match="allow_inplace must be True or False, not 'no'"):
        dc.register_op(name="refused", allow_inplace="no")(scaled)
    with pytest.raises(TypeError, match="register_fake: 3 is not a function"):
        dc.ops.rms_norm.register_fake(3)


def test_priorities(define_ir_op):
    op = define_ir_op(scaled)
    for given, text in [
        ("native", "priority is a list of names; write ['native']"),
        (None, "priority must be a list of names, not None"),
        ([3], "priority must be strings, not 3"),
    ]:
        with pytest.raises(TypeError, match=re.escape(text)):
            op.set_default(given)
        with pytest.raises(TypeError, match=re.escape(text)), op.set_priority(given):
            pass


def test_natives_of_ops_that_are_not_there(define_opaque):
    library = torch.library.Library("dispatch_compile_bad", "FRAGMENT")
    library.define("gone(Tensor x, float s=1.0) -> Tensor")
    overload = torch.ops.dispatch_compile_bad.gone.default
    library._destroy()
    with pytest.raises(ValueError, match=r"dispatch_compile_bad\.gone.default is not registered, or no longer"):
        dc.register_native(overload, scaled)
    with pytest.raises(
        ValueError, match=r"aten\.add has the overloads \['Tensor', 'Scalar', .*\]; name the one you mean"
    ):
        dc.register_native(torch.ops.aten.add, scaled)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ("view(Tensor y, Tensor(a) x) -> Tensor(a)", "returns a view of its argument 'x'"),
        ("parts(Tensor(a) x) -> Tensor(a)[]", "returns a view of its argument 'x'"),
    ],
)
def test_natives_of_ops_that_return_views(schema, text):
    """Never accepted, and then never compiled."""
    library = torch.library.Library("dispatch_compile_bad", "FRAGMENT")
    try:
        library.define(schema)
        with pytest.raises(
            ValueError, match=f"{text}; only ops that return new tensors, or write to arguments, compile"
        ):
            dc.register_native(f"dispatch_compile_bad::{schema.partition('(')[0]}", scaled)
    finally:
        library._destroy()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"stream": "x"}, TypeError, "stream must be a file to write text to, such as sys.stderr, not 'x'"),
        ({"all_ops": "no"}, TypeError, "all_ops must be True or False, not 'no'"),
        ({"ids": 1}, TypeError, "ids must be True or False, not 1"),
        ({"stacks": None}, TypeError, "stacks must be True or False, not None"),
        ({"max_events": "3"}, TypeError, "max_events must be a whole number, not '3'"),
        ({"max_events": True}, TypeError, "max_events must be a whole number, not True"),
        ({"max_events": -1}, ValueError, "max_events must be 0 or more, not -1"),
    ],
)
def test_traces(arguments, error, text):
    with pytest.raises(error, match=f"^Trace: {text}$"):
        dc.Trace(**arguments)
    with pytest.raises(TypeError, match=r"^Trace\.text: all_ops must be True or False, not 'no'"):
        dc.Trace().text(all_ops="no")


@pytest.mark.parametrize(
    ("args", "tokens", "error", "text"),
    [
        ((X, 1.0, 3), None, TypeError, r"takes 2 arguments \('x', 's'\), but 3 were given"),
        ((X, 1.0, 3), [2], TypeError, r"takes 2 arguments \('x', 's'\), but 3 were given"),
        ((X,), 8, TypeError, r"tokens is a list of token counts; write tokens=\[8\]"),
        ((X,), "8", TypeError, r"tokens is a list of token counts; write tokens=\['8'\]"),
        ((X,), [2.5], TypeError, "a token count must be a whole number, not 2.5"),
        ((X,), [True], TypeError, "a token count must be a whole number, not True"),
        ((X,), [4, -1], ValueError, "a token count must be 0 or more, not -1"),
        ((X,), [], ValueError, "tokens must name one count or more"),
    ],
)
def test_warming_up(args, tokens, error, text, define_ir_op):
    mode = dc.DispatchCompileMode(config=EAGER)
    with pytest.raises(error, match=f"^warmup: .*{text}"):
        mode.warmup(define_ir_op(scaled), *args, tokens=tokens)
    assert mode.cache.stats().compiles == 0


def test_saving_to_a_folder(tmp_path):
    with pytest.raises(IsADirectoryError, match="saved code goes into a file, and this is a folder") as error:
        dc.NativeCache().save(tmp_path)
    assert error.value.filename == str(tmp_path)
    assert error.value.filename2 is None
