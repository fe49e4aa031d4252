"""From an implementation and one call's arguments to a graph: run it once on fake tensors whose token dimension
is a symbol, and keep what torch assumed about that symbol as guards."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from .._basics.errors import first_line
from .._basics.nodes import op_or_none, tensor_of, tensor_or_none
from .._dispatch.active import natives_told
from .._ir.protocol import Impl
from .._ir.registry import called_through_torch
from .._specialize.arguments import Arguments, Leaf, Learned, Parameters, layout_with, sizes, strides
from .._specialize.aside import why_special
from .._specialize.guards import evaluated
from .._specialize.memory import overlaps_itself
from .._specialize.stand_ins import Relearn, StandIns, StepAside, contents
from .._torch.capture import dynamic_number, dynamic_size, new_fake_mode, new_shape_env, size_depends_on_values, trace
from .._torch.dispatch import OpOverload
from .config import CompileConfig
from .inlining import NO_CALLS, Composition, Inlining
from .numbers import WITH_SYMBOLS, NumbersAsTensors
from .results import Result, result_of
from .surroundings import NOTHING_READ, Surroundings, Watch, watch_of

if TYPE_CHECKING:
    from .._torch.capture import FakeTensorMode, ShapeEnv


class CannotCapture(Exception):
    """The implementation has no graph that is right for these arguments; the message says why."""


# A Python number as a graph takes it: an input of its own, of one element, on the CPU.
float_tensor = partial(torch.scalar_tensor, dtype=torch.float64)


@dataclass
class Captured:
    """An implementation as a graph of its dynamic sizes and its tensor arguments, in this order.

    Inductor wants every symbol among the inputs. ``guards`` must be called after compilation, which may add to the
    assumptions.
    """

    graph: GraphModule
    token_counts: dict[str, torch.SymInt]  # by the source that reads it: a0.size(0)
    number_symbols: list[torch.SymInt | torch.SymFloat]  # for the dynamic numbers
    numbers: list[torch.SymInt | torch.Tensor]  # the graph takes for them: an integer's symbol, a float's tensor
    fakes: list[torch.Tensor]
    shape_env: ShapeEnv
    result: Result
    written: tuple[Leaf, ...]  # the arguments that the implementation writes to
    arguments: Arguments
    composition: Composition  # what became of calls of IR ops
    surroundings: Surroundings  # what it read of the program around it

    @property
    def inputs(self) -> list[torch.SymInt | torch.Tensor]:
        """What the graph takes, as symbols and fake tensors."""
        return [*self.token_counts.values(), *self.numbers, *self.fakes]

    @property
    def input_sources(self) -> list[str]:
        """Expressions for what the graph takes, in terms of the leaves' sources."""
        numbers = [
            leaf.source if isinstance(leaf.value, int) else f"float_tensor({leaf.source})"
            for leaf in self.arguments.dynamic_numbers
        ]
        return [*self.token_counts, *numbers, *(leaf.source for leaf in self.arguments.tensors)]

    @property
    def outputs(self) -> list[torch.Tensor]:
        """What the graph returns, as fake tensors."""
        [returned] = next(iter(reversed(self.graph.graph.nodes))).args
        return [tensor_of(node) for node in returned]

    @property
    def symbols(self) -> dict[str, str]:
        """Expressions, in terms of the leaves' sources, by the name of the symbol that they are."""
        numbers = zip(self.number_symbols, self.arguments.dynamic_numbers, strict=True)
        return {
            **{str(count): source for source, count in self.token_counts.items()},
            **{str(symbol): leaf.source for symbol, leaf in numbers if isinstance(symbol, torch.SymInt)},
        }

    @property
    def symbol_values(self) -> dict[str, int]:
        """What the symbols stand for in the call, by name."""
        return {symbol: evaluated(source, self.arguments, {}) for symbol, source in self.symbols.items()}

    def inputs_for(self, arguments: Arguments) -> list[Any]:
        """What the graph takes for arguments that have the key."""
        inputs: list[Any] = evaluated(f"[{', '.join(self.input_sources)}]", arguments, {"float_tensor": float_tensor})
        return inputs

    def guards(self) -> str | None:
        """What must hold of the dynamic sizes, as an expression in terms of the leaves' sources; None if nothing."""
        placeholders: Any = [*self.number_symbols, *self.fakes]  # torch leaves out the symbols of floats
        text = self.shape_env.produce_guards_expression(placeholders) or ""
        sources = [leaf.source for leaf in (*self.arguments.dynamic_numbers, *self.arguments.tensors)]
        text = re.sub(r"L\['t(\d+)'\]", lambda match: sources[int(match[1])], text)
        text = re.sub(r"\.(size|stride)\(\)\[(\d+)\]", r".\1(\2)", text)
        return " and ".join(filter(None, [text, *self._sizes_become_static()])) or None

    def _sizes_become_static(self) -> Iterator[str]:
        """Guards on dynamic sizes and strides that capture fixed to a number; torch takes them for static ones."""
        for leaf, fake in zip(self.arguments.tensors, self.fakes, strict=True):
            for read, pattern, dims in (("size", sizes(leaf), fake.shape), ("stride", strides(leaf), fake.stride())):
                for i, (dim, now) in enumerate(zip(pattern, map(str, dims), strict=True)):
                    if not isinstance(dim, int) and now.isdecimal():
                        yield f"{leaf.source}.{read}({i}) == {now}"

    @property
    def may_raise(self) -> bool:
        """Whether there are arguments of the right shapes for which the implementation raises."""
        return any(map(_may_raise, self.graph.graph.nodes))

    def symbolic_shapes(self) -> str:
        """The inputs' sizes, for people: ``[s0, 4096], [4096]``, symbols numbered in order of appearance."""
        symbols: dict[str, str] = {}
        shapes = []
        for fake in self.fakes:
            dims = [
                str(size) if size.isdecimal() else symbols.setdefault(size, f"s{len(symbols)}")
                for size in map(str, fake.shape)
            ]
            shapes.append(f"[{', '.join(dims)}]")
        return ", ".join(shapes)


def capture(
    impl: Impl,
    parameters: Parameters,
    arguments: Arguments,
    config: CompileConfig,
    tokens: Mapping[int, int] | None = None,
) -> Captured:
    """Trace an implementation for these arguments, and with it those of the IR ops that it calls.

    Args:
        impl: the implementation.
        parameters: of the op or function.
        arguments: a call's arguments.
        config: tells which implementations of other ops may be part of the graph.
        tokens: the size to assume for each size of the arguments where the implementation, or the compiler, asks for
            it; the call's own if None. The guards tell whether the graph serves the call.

    Raises:
        StepAside: the result or a side effect could not be kept (random numbers, a result that is a view).
        CannotCapture: the implementation cannot be traced.
        Relearn: it reads of its objects what is not among the leaves.
    """
    inlining = Inlining(impl, config)
    with called_through_torch(), natives_told(inlining.note_native):
        try:
            captured = _traced(impl, parameters, arguments, tokens, inlining)
        except (StepAside, CannotCapture) as reason:
            if not inlining.fuses:
                raise
            captured = _traced(impl, parameters, arguments, tokens, nullcontext())
            return replace(captured, composition=inlining.given_up(reason))
    return replace(captured, composition=inlining.composition())


def _traced(
    impl: Impl,
    parameters: Parameters,
    arguments: Arguments,
    tokens: Mapping[int, int] | None,
    inlining: AbstractContextManager[object],
) -> Captured:
    shape_env = new_shape_env()
    fake_mode = new_fake_mode(shape_env)
    token_counts, symbols, fakes = _fake_inputs(arguments, shape_env, fake_mode, tokens or {})
    stand_ins = StandIns(parameters, lambda tensor: _fake_like(tensor, fake_mode))
    found: list[Result] = []
    watch = watch_of(impl)

    def flat(*inputs: Any) -> list[torch.Tensor]:
        given = inputs[len(token_counts) :]
        tensors = given[len(symbols) :]
        values = arguments.values_with(tensors, given[: len(symbols)])
        args, kwargs = arguments.rebuilt(values, stand_ins.make, defaults=True)
        shown = [args, kwargs, stand_ins.shown]
        before = contents(shown)
        looks = [_looks(tensor) for tensor in tensors]
        with inlining, watch or nullcontext():
            returned = impl.func_impl_fn(*args, **kwargs)
        after = contents(shown)
        if after[:2] != before[:2] or after[2][: len(before[2])] != before[2]:
            raise StepAside("the implementation changes a list or dictionary that it is given")
        inputs_by_source = {leaf.source: t for leaf, t in zip(arguments.tensors, tensors, strict=True)}
        symbols_by_source = zip((leaf.source for leaf in arguments.dynamic_numbers), symbols, strict=True)
        numbers_by_source = {**token_counts, **dict(symbols_by_source)}
        found.append(result_of(returned, inputs_by_source, numbers_by_source))
        _check_inputs(tensors, looks, arguments)
        _check_outputs(found[-1].outputs, tensors, arguments)
        return found[-1].outputs

    try:
        graph = trace(flat, [*token_counts.values(), *symbols, *fakes], {**_DECOMPOSED, **WITH_SYMBOLS})
        numbers = [_number_tensor(fake_mode) if isinstance(one, torch.SymFloat) else one for one in symbols]
        if any(isinstance(one, torch.SymFloat) for one in symbols):
            graph = trace(NumbersAsTensors(graph).run, [*token_counts.values(), *numbers, *fakes])
    except StepAside:
        if stand_ins.unread:
            raise Relearn(Learned(reads=frozenset(stand_ins.unread))) from None
        raise
    except Exception as error:
        if stand_ins.unread:
            raise Relearn(Learned(reads=frozenset(stand_ins.unread))) from None
        raise CannotCapture(_why(error, watch)) from error
    if stand_ins.unread:
        raise Relearn(Learned(reads=frozenset(stand_ins.unread)))
    _unregister_constants(graph)
    written = _check_graph(graph, parameters, arguments)
    if found[-1].expression == "None" and not written:
        raise StepAside("the implementation returns nothing and changes no argument: what it does is not in its graph")
    read = NOTHING_READ if watch is None else watch.surroundings()
    return Captured(
        graph, token_counts, symbols, numbers, fakes, shape_env, found[-1], written, arguments, NO_CALLS, read
    )


def _looks(tensor: torch.Tensor) -> tuple[object, ...]:
    """What of a tensor is not its values. Code does not change it, so that an implementation must not."""
    # What a fake tensor remembers of itself is in attributes, too: _nonzero_memo, _sizes_capsule, ...
    attributes = {name: value for name, value in vars(tensor).items() if not re.search("_memo|_capsule", name)}
    return (tensor.dtype, tensor.shape, tensor.stride(), _storage(tensor), attributes)


def _why(error: Exception, watch: Watch | None) -> str:
    tensors = [] if watch is None else watch.tensors()
    if tensors and "convert all Tensors to FakeTensors" in str(error):
        return f"it reads the tensor {' or '.join(tensors)}, which is no input of the code; give it as an argument"
    return first_line(error)


def _of_bytes(op: OpOverload) -> Callable[..., Any]:
    """``any`` or ``all``, which are uint8 of uint8: Inductor would make them bool, and what is made of them as well."""

    def decomposed(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype is not torch.uint8:
            return NotImplemented
        return op(tensor.to(torch.bool), *args, **kwargs).to(torch.uint8)

    return decomposed


_BOOLEANS = (torch.ops.aten.any, torch.ops.aten.all)
_DECOMPOSED = {op: _of_bytes(op) for packet in _BOOLEANS for op in (packet.default, packet.dim, packet.dims)}


def _fake_like(tensor: torch.Tensor, fake_mode: FakeTensorMode) -> torch.Tensor:
    with fake_mode, torch.inference_mode(tensor.is_inference()):
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _number_tensor(fake_mode: FakeTensorMode) -> torch.Tensor:
    with fake_mode:
        return torch.empty((), dtype=torch.float64)


def _fake_inputs(
    arguments: Arguments, shape_env: ShapeEnv, fake_mode: FakeTensorMode, tokens: Mapping[int, int]
) -> tuple[dict[str, torch.SymInt], list[torch.SymInt | torch.SymFloat], list[torch.Tensor]]:
    """A fake for every tensor leaf, each with storage of its own: a tensor given twice is two inputs."""
    numbers = [dynamic_number(shape_env, leaf.value, f"t{i}") for i, leaf in enumerate(arguments.dynamic_numbers)]
    symbols: dict[int, torch.SymInt] = {}  # tensors with as many tokens share the symbol, as guards then say
    token_counts: dict[str, torch.SymInt] = {}
    fakes = []
    for i, leaf in enumerate(arguments.tensors, len(numbers)):
        tensor = leaf.value
        count = tensor.size(0) if leaf.dynamic else 0
        if leaf.dynamic and count not in symbols:
            symbol = symbols[count] = dynamic_size(shape_env, tokens.get(count, count), f"t{i}")
            token_counts[f"{leaf.source}.size(0)"] = symbol
        size, stride = layout_with(leaf, symbols[count] if leaf.dynamic else None)
        with fake_mode, torch.inference_mode(tensor.is_inference()):
            fake = torch.empty_strided(size, stride, dtype=tensor.dtype, device=tensor.device)
        fakes.append(fake.requires_grad_(tensor.requires_grad))
    return token_counts, numbers, fakes


def _unregister_constants(graph: GraphModule) -> None:
    """Make plain attributes of the tensors that the implementation makes of numbers: AOTAutograd would take buffers for
    inputs, and so keep Inductor from seeing their values."""
    for name, constant in list(graph.named_buffers(recurse=False)):
        delattr(graph, name)
        setattr(graph, name, constant)


def _check_inputs(inputs: Sequence[torch.Tensor], before: Sequence[object], arguments: Arguments) -> None:
    for tensor, looks, leaf in zip(inputs, before, arguments.tensors, strict=True):
        if str(_looks(tensor)) != str(looks):  # what is known of symbols has changed in both
            raise StepAside(f"the implementation changes the shape, memory or attributes of its argument {leaf.name}")
        if tensor.requires_grad != leaf.value.requires_grad:
            raise StepAside(f"the implementation changes whether its argument {leaf.name} requires grad")


def _check_outputs(outputs: list[torch.Tensor], inputs: Sequence[torch.Tensor], arguments: Arguments) -> None:
    owners = {_storage(tensor): f"argument {leaf.name}" for tensor, leaf in zip(inputs, arguments.tensors, strict=True)}
    for i, output in enumerate(outputs):
        reason = _why_not_made_by_code(output)
        if reason is not None:
            raise StepAside(f"result {i} {reason}")
        storage = _storage(output)
        if storage in owners:
            raise StepAside(f"result {i} shares memory with {owners[storage]}")
        owners[storage] = f"result {i}"


def _why_not_made_by_code(output: torch.Tensor) -> str | None:
    """Why compiled code, which makes plain tensors outside autograd, makes another kind of tensor than the
    implementation; None if it does not."""
    if output.requires_grad:
        return "requires grad"
    if isinstance(output, torch.nn.Parameter):
        return "is a Parameter"
    if output.is_inference() != torch.is_inference_mode_enabled():
        return "is an inference tensor" if output.is_inference() else "is made outside of inference mode"
    return why_special(output)


def _check_graph(graph: GraphModule, parameters: Parameters, arguments: Arguments) -> tuple[Leaf, ...]:
    """The arguments that the graph writes to."""
    nodes = list(graph.graph.nodes)
    inputs = [node.meta["val"] for node in nodes if node.op == "placeholder"]
    fakes = inputs[len(inputs) - len(arguments.tensors) :]
    owners = {_storage(fake): leaf for fake, leaf in zip(fakes, arguments.tensors, strict=True)}
    changed: dict[str, Leaf] = {}
    for node in nodes:
        op = op_or_none(node)
        if op is None:
            continue
        if torch.Tag.nondeterministic_seeded in op.tags:
            raise StepAside(f"the implementation draws random numbers ({op})")
        if torch.Tag.data_dependent_output in op.tags or size_depends_on_values(node.meta.get("val")):
            raise CannotCapture(f"it depends on the values in a tensor ({op})")
        if op is torch.ops.aten.as_strided.default:
            raise StepAside("the implementation uses as_strided, which reads the storage offset")
        for written in _written(node, op):
            leaf = owners.get(_storage(tensor_of(written)))
            if leaf is not None:
                _check_may_be_written(leaf, parameters)
                changed[leaf.source] = leaf
    return tuple(changed.values())


def _check_may_be_written(leaf: Leaf, parameters: Parameters) -> None:
    if parameters.written is not None and leaf.parameter not in parameters.written:
        raise StepAside(f"the implementation changes its argument {leaf.name}, which is not declared as mutated")
    if overlaps_itself(leaf.value):
        raise StepAside(f"the implementation writes to {leaf.name}, elements of which share memory")


def _may_raise(node: Node) -> bool:
    """Whether an op may raise because of values: an index out of range, integers divided by zero, a matrix without
    inverse. It cannot if there are no values, or if it computes with floats one by one."""
    op = op_or_none(node)
    if op is None:
        return False
    values = [value for of in node.all_input_nodes if (value := tensor_or_none(of)) is not None]
    copies = op.is_view or op is torch.ops.aten._to_copy.default
    one_by_one = copies or torch.Tag.pointwise in op.tags
    return any(
        0 not in value.shape and not (one_by_one and (value.is_floating_point() or value.is_complex()))
        for value in values
    )


def _written(node: Node, op: OpOverload) -> Iterator[Node]:
    for i, parameter in enumerate(op._schema.arguments):
        if parameter.alias_info is not None and parameter.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(parameter.name)
            yield from (
                item for item in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(item, Node)
            )


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
