"""The embedded IR: registration and its errors, dispatch by priority, in-place implementations, fakes."""

from __future__ import annotations

import pytest
import torch
from support import EAGER, assert_same
from torch import Tensor

import dispatch_compile as dc


def scale(x: Tensor, factor: float = 2.0) -> Tensor:
    """Scale it."""
    return x * factor


@pytest.fixture
def op(define_ir_op):
    return define_ir_op(scale)


@pytest.fixture
def inplace_op(define_ir_op):
    def add(x: Tensor, x_other: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
        total = x + x_other * weight
        return total, x_other * 2

    op = define_ir_op(add, allow_inplace=True)

    @op.register_impl("overwriting", inplace=True)
    def overwriting(x: Tensor, x_other: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
        x.add_(x_other, alpha=weight)
        x_other.mul_(2)
        return x, x_other

    return op


# ---- register_op


def test_bare_and_with_arguments():
    names = ["bare_scale", "named_scale"]
    try:

        @dc.register_op
        def bare_scale(x: Tensor) -> Tensor:
            return x * 2

        @dc.register_op(name="named_scale", activations=["y"])
        def other(x: Tensor, y: Tensor) -> Tensor:
            return x * y

        assert [bare_scale.name, other.name] == names
        assert isinstance(bare_scale, dc.IrOp)
        assert torch.ops.dispatch_compile.bare_scale.default is bare_scale.torch_op
        assert (bare_scale.activations, bare_scale.activation_indices) == (["x"], [0])
        assert (other.activations, other.activation_indices) == (["y"], [1])
        assert dc.IrOp.registry["named_scale"] is other
    finally:
        for name in names:
            if name in dc.IrOp.registry:
                dc.IrOp.registry[name].unregister()


def test_calls_like_the_function(op):
    x = torch.randn(4, 3)
    assert_same(op(x), x * 2)
    assert_same(op(x, 3.0), x * 3)
    assert_same(op(x, factor=3.0), x * 3)
    assert_same(op(x=x), x * 2)
    assert op.__doc__ == "Scale it."
    assert "Tensor x, float factor=2." in repr(op)


def test_activations_by_convention(define_ir_op):
    def mixed(weight: Tensor, x: Tensor, x_rope: Tensor, max_x: Tensor) -> Tensor:
        return x + x_rope + weight + max_x

    op = define_ir_op(mixed)
    assert (op.activations, op.activation_indices) == (["x", "x_rope"], [1, 2])


def test_name_is_taken(op):
    with pytest.raises(ValueError, match=rf"op '{op.name}' is already registered; unregister\(\) it first"):
        dc.register_op(name=op.name)(scale)


@pytest.mark.parametrize("name", ["Scale", "1scale", "sc-ale", "scale.out", "a b"])
def test_malformed_name(name):
    with pytest.raises(ValueError, match=r"op name .* use lower-case letters, digits and underscores"):
        dc.register_op(name=name)(scale)
    assert name not in dc.IrOp.registry


def test_keyword_only_parameters():
    def native(x: Tensor, *, factor: float) -> Tensor:
        return x * factor

    with pytest.raises(ValueError, match="native: parameter 'factor' is keyword-only"):
        dc.register_op(native)


@pytest.mark.parametrize("kind", ["variadic positional", "variadic keyword"])
def test_variadic_parameters(kind):
    def positional(*x: Tensor) -> Tensor:
        return x[0]

    def keyword(x: Tensor, **options: Tensor) -> Tensor:
        return x

    with pytest.raises(ValueError, match=f"is {kind}"):
        dc.register_op(positional if kind == "variadic positional" else keyword)


def test_missing_annotations():
    def native(x, factor: float) -> Tensor:
        return x * factor

    with pytest.raises(ValueError, match="native: no torch schema can be made of the signature"):
        dc.register_op(native)
    assert "native" not in dc.IrOp.registry


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"activations \['y'\] are not among the parameters \['x', 'factor'\]"):
        dc.register_op(name="unknown_activation", activations=["x", "y"])(scale)


def test_allow_inplace_needs_a_result_for_each_activation():
    def join(x: Tensor, x_other: Tensor) -> Tensor:
        return x + x_other

    with pytest.raises(ValueError, match="allow_inplace needs one Tensor result for each activation") as error:
        dc.register_op(allow_inplace=True)(join)
    assert "(Tensor x, Tensor x_other) -> Tensor" in str(error.value)
    assert "join" not in dc.IrOp.registry


# ---- register_impl


def test_implementation_of_the_same_schema(op):
    @op.register_impl("vendor")
    def vendor(x: Tensor, factor: float = 2.0) -> Tensor:
        return x.mul(factor)

    assert isinstance(vendor, dc.IrOpImpl)
    assert op.impls["vendor"] is vendor
    assert (vendor.provider, vendor.inplace, vendor.supported, vendor.supports_all_args) == (
        "vendor",
        False,
        True,
        True,
    )
    assert op.supported_providers() == ["native", "vendor"]


@pytest.mark.parametrize("provider", ["native", "vendor"])
def test_provider_is_taken(provider, op):
    op.register_impl("vendor")(scale)
    with pytest.raises(ValueError, match=f"provider '{provider}' is already registered"):
        op.register_impl(provider)(scale)


@pytest.mark.parametrize("provider", ["", "Vendor", "a-b"])
def test_malformed_provider(provider, op):
    with pytest.raises(ValueError, match=r"provider name .* use lower-case letters"):
        op.register_impl(provider)


def test_schema_differs(op):
    def vendor(x: Tensor, factor: float = 3.0) -> Tensor:
        return x * factor

    with pytest.raises(ValueError, match="the schema of 'vendor' differs from the native one") as error:
        op.register_impl("vendor")(vendor)
    assert "vendor: (Tensor x, float factor=3." in str(error.value)
    assert "native: (Tensor x, float factor=2." in str(error.value)
    assert list(op.impls) == ["native"]


def test_implementation_with_keyword_only_parameters(op):
    def vendor(x: Tensor, *, factor: float = 2.0) -> Tensor:
        return x * factor

    with pytest.raises(ValueError, match="parameter 'factor' is keyword-only"):
        op.register_impl("vendor")(vendor)


def test_inplace_needs_allow_inplace(op):
    with pytest.raises(ValueError, match="register the op with allow_inplace=True"):
        op.register_impl("vendor", inplace=True)


@pytest.mark.parametrize(
    "supports_args",
    [lambda x: True, lambda x, factor: True, lambda x, factor=3.0: True, lambda x, *, factor=2.0: True],
    ids=["missing", "no default", "other default", "keyword-only"],
)
def test_supports_args_signature(supports_args, op):
    with pytest.raises(ValueError, match="supports_args of 'vendor' must have the native implementation's") as error:
        op.register_impl("vendor", supports_args=supports_args)
    assert "native: (x, factor)" in str(error.value)


# ---- Dispatch


@pytest.fixture
def prioritized(op):
    """Providers that add their number, so that a result tells which ran; ``rows`` takes three rows at most."""

    @op.register_impl("rows", supports_args=lambda x, factor=2.0: x.shape[0] <= 3)
    def rows(x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor + 1

    @op.register_impl("vendor")
    def vendor(x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor + 2

    @op.register_impl("absent", supported=False)
    def absent(x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor + 3

    return op


def provider_that_ran(op: dc.IrOp, tokens: int) -> str:
    added = int(op(torch.zeros(tokens, 2))[0, 0])
    return ["native", "rows", "vendor", "absent"][added]


def test_native_without_priority(prioritized):
    assert prioritized.get_priority() == []
    assert provider_that_ran(prioritized, 2) == "native"


def test_priority_and_supports_args(prioritized):
    with prioritized.set_priority(["rows", "vendor", "native"]):
        assert prioritized.get_priority() == ["rows", "vendor", "native"]
        assert [provider_that_ran(prioritized, tokens) for tokens in (2, 3, 4)] == ["rows", "rows", "vendor"]
        with prioritized.set_priority(["rows"]):
            assert [provider_that_ran(prioritized, tokens) for tokens in (3, 4)] == ["rows", "native"]
        assert provider_that_ran(prioritized, 4) == "vendor"
    assert provider_that_ran(prioritized, 4) == "native"


def test_priority_is_restored_after_an_error(prioritized):
    def fail() -> None:
        with prioritized.set_priority(["vendor"]):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert prioritized.get_priority() == []


def test_unsupported_provider_is_left_out(prioritized):
    assert prioritized.supported_providers() == ["native", "rows", "vendor"]
    with prioritized.set_priority(["absent", "vendor"]):
        assert prioritized.get_priority() == ["vendor"]
        assert provider_that_ran(prioritized, 4) == "vendor"


def test_unknown_provider_in_priority(prioritized):
    with pytest.raises(ValueError, match=r"no provider \['nobody'\]; registered are \['native', 'rows'"):
        prioritized.set_priority(["vendor", "nobody"]).__enter__()


def test_set_default(prioritized):
    prioritized.set_default(["vendor"])
    assert provider_that_ran(prioritized, 4) == "vendor"


def test_dispatch_names_the_implementation(prioritized):
    assert prioritized.dispatch(torch.zeros(2, 2)) is prioritized.impls["native"]
    with prioritized.set_priority(["rows", "vendor"]):
        assert prioritized.dispatch(torch.zeros(2, 2)) is prioritized.impls["rows"]
        assert prioritized.dispatch(torch.zeros(5, 2)).provider == "vendor"


# ---- Dispatch inside a mode


def test_mode_respects_the_choice_at_every_call(prioritized):
    mode = dc.DispatchCompileMode(config=EAGER, trace=True)
    with mode, prioritized.set_priority(["rows", "vendor"]):
        assert [provider_that_ran(prioritized, tokens) for tokens in (2, 4)] == ["rows", "vendor"]
        assert mode.cache.stats() == dc.CacheStats(compiles=0, hits=0, fallbacks=0, asides=2)
        with prioritized.set_priority(["rows"]):
            assert [provider_that_ran(prioritized, tokens) for tokens in (2, 4, 3, 5)] == ["rows", "native"] * 2
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 2)
    assert [event.provider for event in mode.trace.events] == ["rows", "vendor"] + ["rows", "native"] * 2
    assert mode.trace.events[0].reason == "provider 'rows' is not in providers ('native',)"


def test_other_providers_are_compiled_when_listed(prioritized):
    config = dc.CompileConfig(backend="eager", providers=("native", "vendor"))
    mode = dc.DispatchCompileMode(config=config)
    with mode, prioritized.set_priority(["rows", "vendor"]):
        assert [provider_that_ran(prioritized, tokens) for tokens in (2, 4, 5)] == ["rows", "vendor", "vendor"]
    assert (mode.cache.stats().compiles, mode.cache.stats().hits, len(mode.cache)) == (1, 2, 1)
    with mode:
        assert provider_that_ran(prioritized, 4) == "native"
    assert len(mode.cache) == 2


# ---- In place


def calls_in_place(op: dc.IrOp, call, x: Tensor, other: Tensor):
    given = (x.clone(), other.clone())
    return call(*given, 0.5), given


@pytest.mark.parametrize("inside", [False, True], ids=["eager", "in a mode"])
@pytest.mark.parametrize("providers", [("native",), ("native", "overwriting")], ids=str)
@pytest.mark.parametrize("priority", [[], ["overwriting"]], ids=str)
def test_default_overload_is_functional(priority, providers, inside, inplace_op):
    x, other = torch.randn(4, 3), torch.randn(4, 3)
    mode = dc.DispatchCompileMode(
        config=dc.CompileConfig(backend="eager", providers=providers), ops=None if inside else []
    )
    with mode, inplace_op.set_priority(priority):
        for _ in range(2):
            result, given = calls_in_place(inplace_op, inplace_op, x, other)
            assert_same(result, (x + other * 0.5, other * 2))
            assert_same(given, (x, other))
    compiled = inside and (not priority or priority[0] in providers)
    assert mode.cache.stats().hits == (2 if compiled else 0)


def test_maybe_inplace_may_reuse(inplace_op):
    x, other = torch.randn(4, 3), torch.randn(4, 3)
    expected = (x + other * 0.5, other * 2)
    result, given = calls_in_place(inplace_op, inplace_op.maybe_inplace, x, other)
    assert_same(result, expected)
    assert_same(given, (x, other))
    with inplace_op.set_priority(["overwriting"]):
        result, given = calls_in_place(inplace_op, inplace_op.maybe_inplace, x, other)
    assert_same(result, expected)
    assert [one.data_ptr() for one in result] == [one.data_ptr() for one in given]


def test_maybe_inplace_is_compiled_with_the_same_code(inplace_op):
    x, other = torch.randn(4, 3), torch.randn(4, 3)
    mode = dc.DispatchCompileMode(config=EAGER)
    with mode:
        for call in (inplace_op, inplace_op.maybe_inplace) * 2:
            result, _ = calls_in_place(inplace_op, call, x, other)
            assert_same(result, (x + other * 0.5, other * 2))
    assert (mode.cache.stats().compiles, mode.cache.stats().hits) == (1, 4)


def test_maybe_inplace_only_where_allowed(op, inplace_op):
    assert op.maybe_inplace is None
    assert str(inplace_op.maybe_inplace.torch_op._schema).count("!") == 2


# ---- Fakes, unregistration


def test_native_is_its_own_fake(op):
    with torch._subclasses.FakeTensorMode():
        assert op(torch.empty(4, 3)).shape == (4, 3)


def test_register_fake(op):
    calls = []

    @op.register_fake
    def fake(x: Tensor, factor: float = 2.0) -> Tensor:
        calls.append(factor)
        return x.new_empty(x.shape)

    with torch._subclasses.FakeTensorMode():
        assert op(torch.empty(4, 3), 5.0).shape == (4, 3)
    assert calls == [5.0]
    assert_same(op(torch.ones(4, 3), 5.0), torch.full((4, 3), 5.0))


def test_unregister(define_ir_op):
    op = define_ir_op(scale, name="short_lived")
    assert torch.ops.dispatch_compile.short_lived.default is op.torch_op
    op.unregister()
    op.unregister()
    assert "short_lived" not in dc.IrOp.registry
    assert not [name for name in torch._C._dispatch_get_all_op_names() if "short_lived" in name]


def test_name_may_be_used_again(define_ir_op):
    mode, x = dc.DispatchCompileMode(config=EAGER), torch.ones(4, 3)
    results = []
    for factor in (2, 3):

        def native(x: Tensor, factor: int = factor) -> Tensor:
            return x * factor

        op = define_ir_op(native, name="recycled")
        with mode:
            results += [op(x)[0, 0].item(), op(x)[0, 0].item()]
        op.unregister()
    assert results == [2, 2, 3, 3]
    assert mode.cache.stats().hits == 4


def test_opcheck(op, inplace_op):
    torch.library.opcheck(op.torch_op, (torch.randn(4, 3),))
    torch.library.opcheck(inplace_op.torch_op, (torch.randn(4, 3), torch.randn(4, 3)))
