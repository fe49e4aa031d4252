"""What code was made of, as text: equal for the same, and different for all that an implementation can tell apart."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dispatch_compile as dc
from dispatch_compile._compile.reading import CannotTell
from dispatch_compile._saved import origin as _origin
from dispatch_compile._saved.origin import CannotSave, Origin, environment, now, origin_of

pytestmark = pytest.mark.run_once

ADDED = 1.0
CONSTANTS = types.ModuleType("constants")
CONSTANTS.added = 1.0


def origin(fn: Callable[..., Any], **config: Any) -> Origin:
    impl = types.SimpleNamespace(provider="native", impl_fn=fn)
    return origin_of("aten::relu", impl, dc.CompileConfig(**config))


def defined(source: str, **scope: Any) -> Callable[..., Any]:
    """The function ``f`` of a source text, in a scope of its own."""
    scope = {"torch": torch, "math": math, "__name__": "somewhere", **scope}
    exec(source, scope)
    return scope["f"]


PLAIN = "def f(x): return torch.rsqrt(x) * 2"


def test_the_same_source_is_the_same():
    assert origin(defined(PLAIN)) == origin(defined(PLAIN))


def test_comments_lines_and_file_do_not_matter():
    assert origin(defined(PLAIN)) == origin(
        defined("\n\n# twice\ndef f(x):\n    # really\n    return torch.rsqrt(x) * 2")
    )


@pytest.mark.parametrize(
    "other",
    [
        "def f(x): return torch.rsqrt(x) * 3",
        "def f(x): return torch.rsqrt(x) * 2.0",
        "def f(x): return torch.rsqrt(x) + 2",
        "def f(x): return torch.sqrt(x) * 2",
        "def f(x, y=1): return torch.rsqrt(x) * 2",
        "def f(x): return (lambda y: torch.rsqrt(y) * 2)(x)",
    ],
)
def test_another_source_is_another(other):
    assert origin(defined(PLAIN)) != origin(defined(other))


@pytest.mark.parametrize(
    ("one", "other"), [(1, 2), (1, True), (1, 1.0), (0.0, -0.0), ("1", 1), ((1,), [1]), (torch.float16, torch.bfloat16)]
)
def test_constants_of_the_program_are_part_of_it(one, other):
    def closing_over(value: Any) -> Callable[..., Any]:
        def f(x: Tensor) -> tuple[Tensor, Any]:
            return x, value

        return f

    def with_default(value: Any) -> Callable[..., Any]:
        def f(x: Tensor, default: Any = value) -> tuple[Tensor, Any]:
            return x, default

        return f

    def with_keyword_default(value: Any) -> Callable[..., Any]:
        def f(x: Tensor, *, default: Any = value) -> tuple[Tensor, Any]:
            return x, default

        return f

    def with_attribute(value: Any) -> Callable[..., Any]:
        def f(x: Tensor) -> tuple[Tensor, Any]:
            return x, f.value

        f.value = value
        return f

    def reading_a_global(value: Any) -> Callable[..., Any]:
        return defined("def f(x): return x, VALUE", VALUE=value)

    def reading_a_global_inside(value: Any) -> Callable[..., Any]:
        return defined("def f(x): return [(y, VALUE) for y in x]", VALUE=value)

    def reading_another_module(value: Any) -> Callable[..., Any]:
        module = types.ModuleType("elsewhere")
        module.inner = types.ModuleType("elsewhere.inner")
        module.inner.value = value
        return defined("def f(x): return x, elsewhere.inner.value", elsewhere=module)

    def calling_another_function(value: Any) -> Callable[..., Any]:
        return defined("def f(x): return g(x)", g=reading_a_global(value))

    for made_with in (
        closing_over,
        with_default,
        with_keyword_default,
        with_attribute,
        reading_a_global,
        reading_a_global_inside,
        reading_another_module,
        calling_another_function,
    ):
        assert origin(made_with(one)) == origin(made_with(one)), made_with.__name__
        assert origin(made_with(one)) != origin(made_with(other)), made_with.__name__


def test_functions_that_call_each_other():
    source = "def f(x, n): return g(x, n - 1) if n else x\ndef g(x, n): return f(x * {}, n)"
    assert origin(defined(source.format(2))) == origin(defined(source.format(2)))
    assert origin(defined(source.format(2))) != origin(defined(source.format(3)))


@pytest.mark.parametrize("op", [getattr(dc.ops, name) for name in dc.ops.__all__], ids=dc.ops.__all__)
def test_ops_that_ship(op):
    assert isinstance(origin(op.impls["native"].impl_fn), Origin)


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (defined("def f(x): return x * STATE", STATE=object()), "STATE is a object"),
        (defined("def f(x): return x * weight", weight=torch.ones(2)), "weight is a Tensor"),
        (defined("def f(x): return torch.ops.mylib.relu(x)"), "torch.ops.mylib.relu"),
        (defined("def f(x): ops = torch.ops.mylib; return ops.relu(x)"), "torch.ops.mylib is a _OpNamespace"),
        (defined("def f(x): return x * float(os.environ['SCALE'])", os=os), "os.environ is a _Environ"),
        (defined("def f(x): return x * float(os.getenv('SCALE'))", os=os), "environ is a _Environ"),
        (defined("def f(x): return x * globals()['SCALE']"), "globals is a builtin"),
        (defined("def f(x): return getattr(constants, 'added')", constants=CONSTANTS), "constants is a module"),
        (defined("def f(x):\n  import os\n  return x * float(os.environ['SCALE'])"), "imports os when it is called"),
        (defined("def f(x):\n  from .math import SCALE\n  return x"), "imports .math when it is called"),
        (defined("def f(x): return later(x)"), "later has no value yet"),
        (defined("def f(x): return constants.later", constants=CONSTANTS), "constants.later has no value yet"),
        (torch.no_grad()(defined(PLAIN)), "is a method"),
        (types.MethodType(defined("def f(self, x): return x"), 3), "the implementation is a method"),
    ],
)
def test_what_another_process_could_not_compare(fn, why):
    with pytest.raises(CannotTell, match=why):
        origin(fn)


def test_an_implementation_that_works_in_place():
    impl = types.SimpleNamespace(provider="native", impl_fn=defined(PLAIN), inplace=True)
    with pytest.raises(CannotSave, match="not a function of its arguments alone"):
        origin_of("aten::relu", impl, dc.CompileConfig())


def test_another_backend():
    with pytest.raises(CannotSave, match="'eager' is not Inductor"):
        origin(defined(PLAIN), backend="eager")


def test_options_are_part_of_it():
    plain, tuned, patient = (
        origin(defined(PLAIN), options=options)
        for options in ({}, {"coordinate_descent_tuning": True}, {"coordinate_descent_tuning": False})
    )
    assert len({plain, tuned, patient}) == 3
    assert plain.implementation == tuned.implementation
    assert origin(defined(PLAIN), bitwise=True) != plain
    in_other_order = [
        origin(defined(PLAIN), options=dict(items))
        for items in ([("cpp.threads", 1), ("debug", False)], [("debug", False), ("cpp.threads", 1)])
    ]
    assert in_other_order[0] == in_other_order[1]


def test_settings_of_the_process_are_part_of_it(monkeypatch):
    from torch._inductor import config

    plain = origin(defined(PLAIN))
    with config.patch(max_autotune=True):
        assert origin(defined(PLAIN)) != plain
    assert origin(defined(PLAIN)) == plain
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert origin(defined(PLAIN)) == plain
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")
    assert origin(defined(PLAIN)) != plain


def test_another_process_says_the_same():
    code = """if True:
        import sys
        import dispatch_compile as dc
        from dispatch_compile._saved.origin import environment, origin_of
        for op in (dc.ops.rms_norm, dc.ops.quant_fp8_per_group):
            print(origin_of(op.torch_op._schema.name, op.impls["native"], dc.CompileConfig()))
        print(environment(cpu=True, cuda_devices=frozenset()))
        assert "torch._inductor" not in sys.modules
    """
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
    [text] = told
    assert text.count("Origin(") == 2


def test_environment_names_what_each_kind_of_kernel_depends_on():
    assert set(environment(cpu=False, cuda_devices=frozenset())) == {"dispatch_compile", "python", "torch"}
    on_cpu = environment(cpu=True, cuda_devices=frozenset())
    assert set(on_cpu) == {"dispatch_compile", "python", "torch", "cpu", "compiler"}
    assert all(value != "none" for value in on_cpu.values())
    on_gpus = environment(cpu=False, cuda_devices=frozenset({0, 3}))
    assert set(on_gpus) == {"dispatch_compile", "python", "torch", "triton", "cuda:0", "cuda:3"}


def test_what_is_not_there():
    assert now("cuda:97") == "none"
    assert now("something that another version asks") == "none"


@pytest.mark.cuda
def test_a_cuda_device():
    assert torch.cuda.get_device_name(0) in now("cuda:0")
    assert now("triton") != "none"


def test_compiler(monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -I")
    assert now("compiler") == f"Python {sys.version.split()[0]}"
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert now("compiler") == "none"


def test_every_edit_of_this_package_is_another_environment(tmp_path):
    def digest_with(**texts: str) -> str:
        for file in tmp_path.iterdir():
            file.unlink()
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
        return _origin._sources(tmp_path)

    digests = [digest_with(a="1", b="2"), digest_with(a="1", b="3"), digest_with(a="1", c="2"), digest_with(a="12")]
    assert len(set(digests)) == 4
    assert digest_with(b="2", a="1") == digests[0]
    assert now("dispatch_compile") == _origin._sources(Path(_origin.__file__).parents[1])
