"""Which ops the sweep calls, and with which arguments: what Inductor compiles in its own way, and so may compute
otherwise than ATen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dispatch_compile._torch.dispatch import OpOverload, has_kernel
from dispatch_compile._torch.inductor import inductors_ops

from . import sweep_values as values

aten = torch.ops.aten

POINTWISE, ORDER = "pointwise", "order"


@dataclass(frozen=True)
class Variant:
    """An op with the arguments of one dtype, and with one choice of its other arguments.

    Attributes:
        text: the other arguments, for people.
        tensors: the tensors among the arguments, to be put in the places of :class:`Hole`.
        kind: what may differ: of ``ORDER``, the last places of what is summed.
        varies: whether eager itself gives other results from call to call on a GPU.
        cancels: of what numbers the results are a small difference, given the first tensor; None if of none.
    """

    op: OpOverload
    dtype: str
    text: str
    args: tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    kind: str
    varies: bool = False
    cancels: Callable[[Tensor], Tensor] | None = None

    def call(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The op's results, with these tensors in the places of its own."""
        result = self.op(*(filled(arg, tensors) for arg in self.args[0]), **self.args[1])
        return [result] if isinstance(result, Tensor) else list(result)


@dataclass(frozen=True)
class Hole:
    """The place of a tensor among arguments."""

    index: int


def filled(arg: Any, tensors: Sequence[Tensor]) -> Any:
    """An argument with tensors in their places."""
    if isinstance(arg, Hole):
        return tensors[arg.index]
    return [filled(item, tensors) for item in arg] if isinstance(arg, list) else arg


def variants(names: Sequence[str] | None, dtype: str) -> list[Variant]:
    """All calls of the sweep in a dtype, or those of the ops with these names."""
    ops = [op for op in swept_ops() if names is None or name_of(op) in names]
    return [variant for op in ops for variant in _variants(op, dtype)]


def name_of(op: OpOverload) -> str:
    return str(op._schema.name).removeprefix("aten::")


def swept_ops() -> list[OpOverload]:
    return [op for op in inductors_ops() if why_left_out(op) is None]


def left_out() -> dict[str, int]:
    """How many of the ops that Inductor knows are not swept, by the reason."""
    return dict(Counter(reason for op in inductors_ops() if (reason := why_left_out(op)) is not None))


def why_left_out(op: OpOverload) -> str | None:
    """Why an op that Inductor lowers or decomposes is not swept; None if it is."""
    name = name_of(op)
    if op._schema.is_mutable:
        return "changes its arguments"
    if torch.Tag.nondeterministic_seeded in op.tags or name.startswith(("_fused_dropout", "native_dropout")):
        return "draws random numbers"
    if not any("Tensor" in str(argument.type) for argument in op._schema.arguments):
        return "takes no tensor"
    if op.is_view or (name.endswith("_copy") and name not in ("_to_copy", "index_copy")):
        return "only moves values"
    if "backward" in name:
        return "is for training"
    if "_foreach" in name or name.startswith(("_test", "_foobar")):
        return "is not called by people"
    if name in RECIPES:
        return None
    if "_polynomial_" in name or name in ("polygamma", "special_zeta"):
        return "is ATen's alone, and takes minutes for some values"
    if has_kernel(op, "CompositeImplicitAutograd"):
        return "is made of other ops"
    if torch.Tag.pointwise in op.tags:
        return None
    return "has no recipe for its arguments"


def _variants(op: OpOverload, dtype: str) -> Iterator[Variant]:
    name = name_of(op)
    recipe = RECIPES.get(name)
    if recipe is not None:
        made = recipe(Maker(values.DTYPES[dtype], op._overloadname))
        kind = ORDER if name in SUMS else POINTWISE
    else:
        made = _pointwise(op, values.DTYPES[dtype])
        kind = POINTWISE
    for text, args, kwargs in made:
        tensors: list[Tensor] = []
        holed = tuple(_holed(arg, tensors) for arg in args)
        yield Variant(op, dtype, text, (holed, kwargs), tuple(tensors), kind, name in VARYING, CANCELLING.get(name))


def _holed(arg: Any, tensors: list[Tensor]) -> Any:
    if isinstance(arg, Tensor):
        tensors.append(arg)
        return Hole(len(tensors) - 1)
    return [_holed(item, tensors) for item in arg] if isinstance(arg, list) else arg


Made = Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]

# What comes after the tensors, where it is not simply a number or left to its default.
CHOICES: dict[str, list[tuple[Any, ...]]] = {
    "clamp.default": [(0.1, 1.7), (-0.0, None), (0.0, None), (None, 0), (-1, 1)],
    "clamp_min.default": [(0,), (0.1,), (-1.7,)],
    "clamp_max.default": [(0,), (0.1,), (-1.7,)],
    "div.Tensor_mode": [("floor",), ("trunc",), (None,)],
    "div.Scalar_mode": [(n, mode) for mode in ("floor", "trunc") for n in (0.1, 1.7, -3, 2)],
    "gelu.default": [(), ("tanh",)],
    "logit.default": [(), (1e-3,)],
    "elu.default": [(), (0.52,), (-0.3, 1.7, 0.1)],
    "celu.default": [(), (0.52,)],
    "leaky_relu.default": [(), (0.1,), (-1.7,)],
    "softplus.default": [(), (1.7, 5)],
    "hardtanh.default": [(), (-0.1, 1.7), (0.0, 6.0)],
    "threshold.default": [(0.1, 1.7), (0, -3)],
    "hardshrink.default": [(), (0.1,)],
    "softshrink.default": [(), (0.1,)],
    "nan_to_num.default": [(), (1.7, 0.1, -0.1)],
    "round.decimals": [(2,), (-1,), (0,)],
    "add.Tensor": [(), (0.1,), (-3,)],
    "sub.Tensor": [(), (0.1,), (-3,)],
    "rsub.Tensor": [(), (0.1,)],
    "add.Scalar": [(0.1,), (1.7,), (3,)],
    "sub.Scalar": [(0.1,), (1.7,), (3,)],
    "rsub.Scalar": [(0.1,), (1.7,), (3,)],
    "pow.Tensor_Scalar": [(n,) for n in (2, 3, 0.5, -1, -2, 1.7, 0.1, 0, -0.5, 4)],
    "mvlgamma.default": [(2,)],
    "lerp.Scalar": [(0.3,), (0.7,), (1.7,)],
    "isneginf.default": [()],
}
# Where Python puts a number among the tensors: x * 0.1 is mul.Tensor(x, 0.1).
BESIDE_NUMBERS = ("add", "sub", "mul", "div", "floor_divide")
DIVIDES = ("floor_divide", "remainder", "fmod", "div")  # integers divided by zero raise


def _pointwise(op: OpOverload, dtype: torch.dtype) -> Made:
    arguments = op._schema.arguments
    kinds = [str(argument.type) for argument in arguments]
    name = name_of(op)
    tensors = _tensors_for(op, dtype, [k for k in kinds if k in ("Tensor", "Optional[Tensor]")], name)
    if kinds[0] not in ("Tensor", "Optional[Tensor]"):
        for number in values.scalars(dtype):
            yield f"{number}, x", (number, *tensors), {}
        return
    if name in BESIDE_NUMBERS and op._overloadname in ("Tensor", "default"):
        for number in values.scalars(dtype):
            if dtype.is_floating_point or name not in DIVIDES or number:
                yield f"x, {number}", (values.ones(dtype), number), {}
    wants_number = [a for a in arguments[len(tensors) :] if not a.has_default_value() and not a.kwarg_only]
    numbers: list[tuple[Any, ...]] = [(number,) * len(wants_number) for number in values.scalars(dtype)]
    numbers = numbers if wants_number else [()]
    for choice in CHOICES.get(f"{name}.{op._overloadname}", numbers):
        if not dtype.is_floating_point and name in DIVIDES and any(n == 0 for n in choice):
            continue
        rest: tuple[Any, ...] = choice
        kwargs: dict[str, Any] = {}
        if op._overloadname.endswith("_mode"):
            rest, kwargs = choice[:-1], {"rounding_mode": choice[len(choice) - 1]}
        elif choice and arguments[len(tensors)].kwarg_only:
            rest, kwargs = (), {arguments[len(tensors)].name: choice[0]}
        text = ", ".join(map(str, (*rest, *kwargs.values())))
        yield text, (*tensors, *rest), kwargs


def _tensors_for(op: OpOverload, dtype: torch.dtype, kinds: list[str], name: str) -> list[Tensor]:
    if len(kinds) == 1:
        return [values.ones(dtype)]
    if name in ("where", "masked_fill"):
        made = values.several(dtype, 3)
        mask = torch.rand(len(made[0]), generator=torch.Generator().manual_seed(9)) > 0.5
        return [mask, *made[1:]] if name == "where" else [made[0], mask]
    made = values.several(dtype, len(kinds))
    if dtype in values.INTEGERS.values() and name in (*DIVIDES, "gcd", "lcm"):  # some of these end the process
        lowest = torch.iinfo(dtype).min if dtype is not torch.bool else False
        made[0] = torch.where((made[0] == lowest) & (lowest != 0), 1, made[0]).to(dtype)
        made[1] = torch.where(made[1] == 0, 1, made[1]).to(dtype)
    return made


@dataclass(frozen=True)
class Maker:
    """Makes the arguments of ops that are not computed element by element."""

    dtype: torch.dtype
    overload: str

    @property
    def positive(self) -> Tensor:
        return values.rows(self.dtype, special=False)

    @property
    def special(self) -> Tensor:
        return values.rows(self.dtype, special=True)

    def both(self) -> list[tuple[str, Tensor]]:
        return [("", self.positive), ("special values", self.special)]

    def image(self, *size: int) -> Tensor:
        count = math.prod(size)
        return values.rows(self.dtype, special=False).flatten()[:count].reshape(size)

    def matrix(self, *size: int) -> Tensor:
        return self.image(*size)

    def indices(self, *size: int, below: int) -> Tensor:
        return torch.randint(0, below, size, generator=torch.Generator().manual_seed(8))


def _reducing(*choices: tuple[Any, ...]) -> Callable[[Maker], Made]:
    """Arguments of a reduction over all elements, rows and columns."""

    def made(make: Maker) -> Made:
        for label, matrix in make.both():
            for choice in choices:
                yield ", ".join(filter(None, [label, *map(str, choice)])), (matrix, *choice), {}

    return made


def _by_overload(**recipes: Callable[[Maker], Made]) -> Callable[[Maker], Made]:
    def made(make: Maker) -> Made:
        recipe = recipes.get(make.overload)
        return recipe(make) if recipe is not None else iter(())

    return made


def _args(make_args: Callable[[Maker], list[tuple[Any, ...]]]) -> Callable[[Maker], Made]:
    """Arguments with a text of what is not a tensor."""

    def made(make: Maker) -> Made:
        for args in make_args(make):
            kwargs = args[-1] if isinstance(args[-1], dict) else {}
            args = args[: len(args) - bool(kwargs)]
            text = ", ".join(str(arg) for arg in (*args, *kwargs.values()) if not _has_tensor(arg))
            yield text, args, kwargs

    return made


def _has_tensor(arg: Any) -> bool:
    return isinstance(arg, Tensor) or (isinstance(arg, list) and any(map(_has_tensor, arg)))


ALL = _reducing(())
DIM = _reducing((-1,), (0,))
DIMS = _reducing(([-1],), ([0],), ([0, 1],))
CASTS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16]
CASTS += [torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


def _casts(make: Maker) -> Made:
    for dtype in CASTS:
        if dtype is not make.dtype:
            yield str(dtype).removeprefix("torch."), (values.ones(make.dtype),), {"dtype": dtype}


def _losses(*more: tuple[Any, ...]) -> Callable[[Maker], Made]:
    return _args(lambda m: [(m.positive, m.special, *choice) for choice in more])


def _upsampled(dims: int, *corners: bool) -> Callable[[Maker], Made]:
    """Images enlarged to a size, and by a factor that is no whole number."""
    shape, size = [(2, 3, 60), (2, 3, 9, 13), (2, 3, 4, 5, 6)][dims - 1], [[97], [17, 23], [7, 9, 11]][dims - 1]
    modes: list[tuple[Any, ...]] = [(corner,) for corner in corners] or [()]

    def args(make: Maker) -> list[tuple[Any, ...]]:
        image = make.image(*shape)
        if make.overload != "vec":
            return [(image, size, *mode) for mode in modes]
        wholes: list[tuple[Any, ...]] = [(image, size, *mode, None) for mode in modes]
        return wholes + [(image, None, *mode, [1.7] * dims) for mode in modes]

    return _args(args)


RECIPES: dict[str, Callable[[Maker], Made]] = {
    "_to_copy": _casts,
    "floor_divide": _by_overload(
        default=lambda m: _pointwise(aten.floor_divide.default, m.dtype),
        Scalar=lambda m: (
            (str(n), (values.ones(m.dtype), n), {}) for n in values.scalars(m.dtype) if n or m.dtype.is_floating_point
        ),
    ),
    "special_ndtr": _args(lambda m: [(values.ones(m.dtype),)]),
    "special_log_ndtr": _args(lambda m: [(values.ones(m.dtype),)]),
    "selu": _args(lambda m: [(values.ones(m.dtype),)]),
    "square": _args(lambda m: [(values.ones(m.dtype),)]),
    "relu6": _args(lambda m: [(values.ones(m.dtype),)]),
    "hardswish": _args(lambda m: [(values.ones(m.dtype),)]),
    "log_sigmoid_forward": _args(lambda m: [(values.ones(m.dtype),)]),
    "isfinite": _args(lambda m: [(values.ones(m.dtype),)]),
    "isclose": _args(lambda m: [tuple(values.several(m.dtype, 2))]),
    "isreal": _args(lambda m: [(values.ones(m.dtype),)]),
    "rsub": lambda m: _pointwise(getattr(aten.rsub, m.overload), m.dtype),
    "float_power": _by_overload(
        Tensor_Scalar=_args(lambda m: [(values.ones(m.dtype), n) for n in (2, 0.5, 1.7)]),
        Tensor_Tensor=_args(lambda m: [tuple(values.several(m.dtype, 2))]),
    ),
    "_prelu_kernel": _args(lambda m: [tuple(values.several(m.dtype, 2))]),
    "glu": _args(lambda m: [(m.special[:36].clone(), 0)]),
    "sum": _by_overload(default=ALL, dim_IntList=DIMS),
    "nansum": _reducing((), ([-1],), ([0],)),
    "mean": _by_overload(default=ALL, dim=DIMS),
    "prod": _by_overload(default=ALL, dim_int=DIM),
    "var": _by_overload(correction=_reducing(([-1],), ([0],))),
    "std": _by_overload(correction=_reducing(([-1],), ([0],))),
    "var_mean": _by_overload(correction=_reducing(([-1],), ([0],))),
    "std_mean": _by_overload(correction=_reducing(([-1],), ([0],))),
    "linalg_vector_norm": _reducing((2, [-1]), (1, [0]), (math.inf, [-1]), (-math.inf, [-1]), (0, [-1]), (3.5, [-1])),
    "norm": _by_overload(Scalar=ALL, ScalarOpt_dim=_reducing((2, [-1]), (1, [0]), (0.5, [-1]))),
    "logsumexp": DIMS,
    "_softmax": _args(lambda m: [(x, d, False) for _, x in m.both() for d in (-1, 0)]),
    "_log_softmax": _args(lambda m: [(x, d, False) for _, x in m.both() for d in (-1, 0)]),
    "_safe_softmax": DIM,
    "cumsum": DIM,
    "cumprod": DIM,
    "cummax": DIM,
    "cummin": DIM,
    "logcumsumexp": DIM,
    "amax": DIMS,
    "amin": DIMS,
    "aminmax": _args(lambda m: [(x, {"dim": -1}) for _, x in m.both()]),
    "argmax": DIM,
    "argmin": DIM,
    "max": _by_overload(default=ALL, dim=DIM, other=_args(lambda m: [tuple(values.several(m.dtype, 2))])),
    "min": _by_overload(default=ALL, dim=DIM, other=_args(lambda m: [tuple(values.several(m.dtype, 2))])),
    "median": _by_overload(default=ALL, dim=DIM),
    "mode": DIM,
    "kthvalue": _reducing((3, -1)),
    "any": _by_overload(default=ALL, dim=DIM, dims=DIMS),
    "all": _by_overload(default=ALL, dim=DIM, dims=DIMS),
    "count_nonzero": _by_overload(default=_reducing(()), dim_IntList=_reducing(([-1],), ([0],))),
    "sort": _by_overload(stable=_args(lambda m: [(x, {"stable": True, "dim": -1}) for _, x in m.both()])),
    "topk": _args(lambda m: [(m.positive, 5)]),
    "native_layer_norm": _args(lambda m: [(x, [x.size(-1)], None, None, 1e-5) for _, x in m.both()]),
    "native_group_norm": _args(lambda m: [(m.image(2, 6, 31), None, None, 2, 6, 31, 3, 1e-5)]),
    "_native_batch_norm_legit_no_training": _args(
        lambda m: [(m.image(2, 6, 31), None, None, m.image(6), m.image(6), 0.1, 1e-5)]
    ),
    "mm": _by_overload(default=_args(lambda m: [(m.matrix(31, 47), m.matrix(47, 19))])),
    "bmm": _by_overload(default=_args(lambda m: [(m.matrix(2, 17, 31), m.matrix(2, 31, 19))])),
    "addmm": _by_overload(
        default=_args(lambda m: [(m.matrix(19), m.matrix(31, 47), m.matrix(47, 19), {"beta": 0.5, "alpha": 2})])
    ),
    "baddbmm": _by_overload(default=_args(lambda m: [(m.matrix(2, 17, 19), m.matrix(2, 17, 31), m.matrix(2, 31, 19))])),
    "addmv": _args(lambda m: [(m.matrix(31), m.matrix(31, 47), m.matrix(47))]),
    "addr": _args(lambda m: [(m.matrix(31, 47), m.matrix(31), m.matrix(47), {"beta": 0.5, "alpha": 1.7})]),
    "mv": _args(lambda m: [(m.matrix(31, 47), m.matrix(47))]),
    "dot": _args(lambda m: [(m.matrix(401), m.matrix(401))]),
    "trace": _args(lambda m: [(m.positive,)]),
    "convolution": _args(
        lambda m: [(m.image(2, 3, 15, 17), m.image(4, 3, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)]
    ),
    "avg_pool2d": _args(lambda m: [(m.image(2, 3, 15, 17), [3, 3], [2, 2], [1, 1])]),
    "avg_pool3d": _args(lambda m: [(m.image(2, 3, 5, 6, 7), [2, 2, 2])]),
    "_adaptive_avg_pool2d": _args(lambda m: [(m.image(2, 3, 15, 17), [4, 5])]),
    "max_pool2d_with_indices": _args(lambda m: [(m.image(2, 3, 15, 17), [3, 3], [2, 2], [1, 1])]),
    "adaptive_max_pool2d": _args(lambda m: [(m.image(2, 3, 15, 17), [4, 5])]),
    "grid_sampler_2d": _args(
        lambda m: [
            (m.image(2, 3, 9, 11), m.image(2, 7, 8, 2) * 2 - 2, mode, padding, corners)
            for mode, padding, corners in ((0, 0, False), (1, 1, False), (2, 2, True), (0, 1, True))
        ]
    ),
    "affine_grid_generator": _args(lambda m: [(m.image(2, 2, 3), [2, 3, 7, 9], c) for c in (True, False)]),
    "upsample_linear1d": _upsampled(1, True, False),
    "upsample_bilinear2d": _upsampled(2, True, False),
    "upsample_bicubic2d": _upsampled(2, True, False),
    "upsample_trilinear3d": _upsampled(3, True, False),
    "upsample_nearest1d": _upsampled(1),
    "upsample_nearest2d": _upsampled(2),
    "upsample_nearest3d": _upsampled(3),
    "_upsample_nearest_exact1d": _upsampled(1),
    "_upsample_nearest_exact2d": _upsampled(2),
    "_upsample_nearest_exact3d": _upsampled(3),
    "_upsample_bilinear2d_aa": _upsampled(2, True, False),
    "_upsample_bicubic2d_aa": _upsampled(2, True, False),
    "binary_cross_entropy": _args(
        lambda m: (
            [(m.image(37, 60) / 2, (m.image(37, 60) - 0.5), None, r) for r in (0, 1)]
            if m.dtype.is_floating_point
            else []
        )
    ),
    "binary_cross_entropy_with_logits": _losses((None, None, 0), (None, None, 1)),
    "mse_loss": _losses((0,), (1,)),
    "huber_loss": _losses((0, 1.7), (1, 0.1)),
    "smooth_l1_loss": _losses((0, 1.7), (1, 0.1)),
    "soft_margin_loss": _losses((0,), (1,)),
    "l1_loss": _losses((0,)),
    "kl_div": _losses((0,)),
    "nll_loss_forward": _args(lambda m: [(m.special, m.indices(37, below=67), None, r, -100) for r in (0, 1)]),
    "dist": _args(lambda m: [(m.positive, m.special, p) for p in (1, 2)]),
    "_euclidean_dist": _args(lambda m: [(m.positive, m.image(17, 67))]),
    "renorm": _args(lambda m: [(m.positive, 2, 0, 1.7)]),
    "linalg_cross": _args(lambda m: [(m.image(37, 3), m.image(40, 3)[3:].clone())]),
    "cat": _args(lambda m: [([m.special, m.positive], -1)]),
    "stack": _args(lambda m: [([m.special, m.positive], 1)]),
    "clone": _args(lambda m: [(m.special,)]),
    "flip": _args(lambda m: [(m.special, [-1])]),
    "roll": _args(lambda m: [(m.special, [5], [1])]),
    "repeat": _args(lambda m: [(m.special, [2, 3])]),
    "tril": _args(lambda m: [(m.special, 1)]),
    "triu": _args(lambda m: [(m.special, -1)]),
    "constant_pad_nd": _args(lambda m: [(m.special, [1, 2], n) for n in (0.1, -0.0)]),
    "reflection_pad1d": _args(lambda m: [(m.special, [3, 2])]),
    "reflection_pad2d": _args(lambda m: [(m.image(2, 9, 11), [3, 2, 1, 2])]),
    "replication_pad1d": _args(lambda m: [(m.special, [3, 2])]),
    "replication_pad2d": _args(lambda m: [(m.image(2, 9, 11), [3, 2, 1, 2])]),
    "pixel_shuffle": _args(lambda m: [(m.image(2, 8, 3, 5), 2)]),
    "pixel_unshuffle": _args(lambda m: [(m.image(2, 2, 6, 10), 2)]),
    "im2col": _args(lambda m: [(m.image(2, 3, 9, 11), [3, 3], [1, 1], [1, 1], [2, 2])]),
    "col2im": _args(lambda m: [(m.image(2, 12, 20), [5, 6], [2, 2], [1, 1], [0, 0], [1, 1])]),
    "diag_embed": _args(lambda m: [(m.special,)]),
    "full_like": _args(lambda m: [(m.special, n) for n in (0.1, 1.7, math.inf, -0.0, 3)]),
    "fill": _by_overload(Scalar=_args(lambda m: [(m.special, n) for n in (0.1, 1.7, -0.0)])),
    "embedding": _args(lambda m: [(m.special, m.indices(19, below=37))]),
    "index_select": _args(lambda m: [(m.special, 1, m.indices(19, below=37))]),
    "index": _by_overload(Tensor=_args(lambda m: [(m.special, [m.indices(19, below=37)])])),
    "gather": _args(lambda m: [(m.special, 1, m.indices(37, 19, below=67))]),
    "take": _args(lambda m: [(m.special, m.indices(19, below=999))]),
    "scatter": _by_overload(
        value=_args(lambda m: [(m.special, 1, m.indices(37, 1, below=67), n) for n in (0.1, 1.7)]),
        src=_args(lambda m: [(m.special, 1, m.indices(37, 1, below=67), m.positive)]),
    ),
    "scatter_add": _args(lambda m: [(m.positive, 1, m.indices(37, 19, below=67), m.positive)]),
    "scatter_reduce": _args(
        lambda m: [
            (m.special, 1, m.indices(37, 19, below=67), m.special, how)
            for how in ("sum", "prod", "amax", "amin", "mean")
        ]
    ),
    "index_add": _args(lambda m: [(m.positive, 0, m.indices(19, below=37), m.image(19, 67))]),
    "index_put": _args(lambda m: [(m.special, [m.indices(19, below=37)], m.image(19, 67), True)]),
    "index_fill": _by_overload(int_Scalar=_args(lambda m: [(m.special, 1, m.indices(19, below=67), 1.7)])),
    "masked_fill": lambda m: (
        _pointwise(getattr(aten.masked_fill, m.overload), m.dtype) if m.overload == "Scalar" else iter(())
    ),
    "masked_scatter": _args(lambda m: [(m.special, m.positive > 1, m.special)]),
    "select_scatter": _args(lambda m: [(m.special, m.image(37), 1, 3)]),
    "slice_scatter": _args(lambda m: [(m.special, m.image(19, 67), 0, 3, 22)]),
    "bucketize": _by_overload(Tensor=_args(lambda m: [(m.special, m.image(30).sort().values)])),
    "searchsorted": _by_overload(Tensor=_args(lambda m: [(m.positive.sort(-1).values, m.special)])),
    "isin": _by_overload(
        Tensor_Tensor=_args(lambda m: [(m.special, m.image(19))]),
        Tensor_Scalar=_args(lambda m: [(m.special, n) for n in (0.1, 1)]),
    ),
    "_unsafe_index": _by_overload(Tensor=_args(lambda m: [(m.special, [m.indices(19, below=37)])])),
}

SUMS = frozenset(
    "sum nansum mean prod var std var_mean std_mean linalg_vector_norm norm logsumexp _softmax _log_softmax "
    "_safe_softmax cumsum cumprod logcumsumexp native_layer_norm native_group_norm "
    "_native_batch_norm_legit_no_training mm bmm addmm baddbmm addmv mv dot trace convolution avg_pool2d avg_pool3d "
    "_adaptive_avg_pool2d "
    "binary_cross_entropy binary_cross_entropy_with_logits mse_loss huber_loss smooth_l1_loss soft_margin_loss "
    "nll_loss_forward dist _euclidean_dist renorm scatter_add scatter_reduce index_add index_put col2im".split()
)
# As torch.use_deterministic_algorithms says: the order of atomic additions, and which of equal numbers is found.
VARYING = frozenset(["index_add", "index_put", "scatter_add", "scatter_reduce", "median"])
# 1 + erf(x) and 1 + tanh(x) are small differences where they are close to 0.
CANCELLING: dict[str, Callable[[Tensor], Tensor]] = {"gelu": Tensor.abs, "special_ndtr": torch.ones_like}
