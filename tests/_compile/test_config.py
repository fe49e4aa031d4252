"""``CompileConfig``: what it refuses, what it is equal to, and that its options reach the compiler."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import assert_same, specializations
from torch import Tensor

import dispatch_compile as dc


def test_defaults():
    config = dc.CompileConfig()
    assert (config.backend, dict(config.options), config.providers, config.on_failure) == (
        "inductor",
        {},
        ("native",),
        "native",
    )


def test_frozen():
    config = dc.CompileConfig(options={"max_autotune": True})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.backend = "eager"
    with pytest.raises(TypeError):
        config.options["max_autotune"] = False


def test_options_are_copied():
    options = {"max_autotune": True}
    config = dc.CompileConfig(options=options)
    options["max_autotune"] = False
    assert config.options["max_autotune"] is True


def test_only_keywords():
    with pytest.raises(TypeError):
        dc.CompileConfig("eager")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"on_failure": "warn"}, ValueError, "on_failure must be one of .*'native', 'raise'.*, not 'warn'"),
        ({"backend": "inducto"}, ValueError, "unknown backend 'inducto'; did you mean 'inductor'"),
        ({"backend": 3}, TypeError, "backend must be a name or a callable, not 3"),
        ({"options": {"max_autotun": 1}}, ValueError, "Inductor has no option 'max_autotun'; did you mean 'max_auto"),
        ({"options": {"qqqqq": 1}}, ValueError, "Inductor has no option 'qqqqq'$"),
        ({"options": ["max_autotune"]}, TypeError, "options must be a mapping, not list"),
        ({"options": {"max_autotune": True}, "backend": "eager"}, ValueError, "options are Inductor's, but .* 'eager'"),
        ({"bitwise": 1}, TypeError, "bitwise must be True or False, not 1"),
        ({"bitwise": True, "backend": "eager"}, ValueError, "bitwise is for Inductor, but the backend is 'eager'"),
        ({"providers": "native"}, TypeError, r"providers is a list of names; write \['native'\]"),
        ({"providers": ["native", 1]}, TypeError, "providers must be strings, not 1"),
        ({"providers": None}, TypeError, "providers must be a list of names, not None"),
        ({"providers": []}, ValueError, "providers must name one or more"),
        ({"providers": ["nativ"]}, ValueError, "no op has a provider 'nativ'; did you mean 'native'"),
        ({"options": {"max_autotune": "yes"}}, TypeError, "Inductor's option 'max_autotune' must be bool, not 'yes'"),
        ({"options": {"max-autotune": 1}}, TypeError, "Inductor's option 'max-autotune' must be bool, not 1"),
        ({"options": {"cpp.threads": True}}, TypeError, "Inductor's option 'cpp.threads' must be int, not True"),
        ({"options": {"cpp.simdlen": "8"}}, TypeError, "Inductor's option 'cpp.simdlen' must be .*int.*, not '8'"),
        ({"options": {1: 2}}, TypeError, "the names of options must be strings, not 1"),
        ({"options": []}, TypeError, "options must be a mapping, not list"),
    ],
)
def test_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        dc.CompileConfig(**arguments)


# ---- Equality


def backend(graph, inputs):
    return graph


EQUAL = [
    ({}, {"backend": "inductor", "options": {}, "bitwise": False, "providers": ["native"]}),
    ({}, {"on_failure": "native"}),
    ({"options": {"max_autotune": True, "cpp.simdlen": 8}}, {"options": {"cpp.simdlen": 8, "max_autotune": True}}),
    ({"options": {"max-autotune": True}}, {"options": {"max_autotune": True}}),
    ({"backend": backend}, {"backend": backend}),
    ({"providers": ["a", "b"]}, {"providers": ("a", "b")}),
]
DIFFERENT = [
    ({"options": {"aot_inductor.metadata": {"a": True}}}, {"options": {"aot_inductor.metadata": {"a": 1}}}),
    ({"options": {"max_autotune": True}}, {"options": {"max_autotune": False}}),
    ({"options": {"max_autotune": True}}, {}),
    ({"options": {"aot_inductor.metadata": {"a": 8}}}, {"options": {"aot_inductor.metadata": {"a": 8.0}}}),
    ({"options": {"cpp.simdlen": None}}, {}),
    ({"bitwise": True}, {}),
    ({"backend": "eager"}, {"backend": "aot_eager"}),
    ({"backend": backend}, {"backend": lambda graph, inputs: graph}),
    ({"providers": ["a", "b"]}, {"providers": ["b", "a"]}),
    ({"on_failure": "native"}, {"on_failure": "raise"}),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal(one, other):
    one, other = dc.CompileConfig(**one), dc.CompileConfig(**other)
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different(one, other):
    one, other = dc.CompileConfig(**one), dc.CompileConfig(**other)
    assert one != other
    assert len({one: 1, other: 2}) == 2


def test_not_equal_to_something_else():
    assert dc.CompileConfig() != "inductor"


def test_options_that_are_lists_or_mappings_are_hashable():
    options = {"post_grad_custom_pre_pass": None, "aot_inductor.metadata": {"a": ["b", "c"]}}
    known = torch._inductor.list_options()
    config = dc.CompileConfig(options={name: value for name, value in options.items() if name in known})
    assert hash(config) == hash(dc.CompileConfig(options=dict(config.options)))


# ---- The compiler gets them


def source(options: dict[str, object]) -> str:
    mode, x = dc.DispatchCompileMode(config=dc.CompileConfig(options=options)), torch.randn(4, 40)
    with mode:
        dc.ops.silu_and_mul(x)
    (specialization,) = specializations(mode, dc.ops.silu_and_mul)
    return specialization.code.source


def test_options_reach_inductor():
    assert "assert_size_stride(" in source({"size_asserts": True})
    assert "assert_size_stride(" not in source({"size_asserts": False})
    assert "cpp_fused_" not in source({"cpp.descriptive_names": False})


def test_options_do_not_stay_behind():
    before = torch._inductor.config.size_asserts
    source({"size_asserts": True})
    assert torch._inductor.config.size_asserts == before


@pytest.mark.parametrize("name", ["eager", "aot_eager"])
def test_other_backends_by_name(name, counted):
    mode, x = dc.DispatchCompileMode(config=dc.CompileConfig(backend=name)), torch.randn(4, 3)
    with mode:
        for _ in range(2):
            assert_same(counted(x), x * 2 + 1)
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 2)


def test_backend_as_a_callable(counted):
    seen = []

    def recording(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        seen.append([node.target for node in graph.graph.nodes if node.op == "call_function"])

        def run(*args):
            seen.append("run")
            return graph(*args)

        return run

    mode, x = dc.DispatchCompileMode(config=dc.CompileConfig(backend=recording)), torch.randn(4, 3)
    with mode:
        assert_same(counted(x), x * 2 + 1)
        assert torch.ops.aten.mul.Tensor in seen[0]
        seen.clear()
        for _ in range(2):
            assert_same(counted(x), x * 2 + 1)
    assert seen == ["run", "run"]
    (specialization,) = specializations(mode, counted.op)
    assert specialization.code.source is None
