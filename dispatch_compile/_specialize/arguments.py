"""A call's arguments, read into leaves: tensors and constants, each with the place where generated code finds it."""

from __future__ import annotations

import enum
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch

from .._torch.dispatch import OpOverload

# What is baked into code by its value, or, as functions and types, by its identity.
CONSTANTS = (
    *(bool, int, float, complex, str, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(enum.Enum, type, FunctionType, BuiltinFunctionType),
)


@dataclass(frozen=True)
class Parameters:
    """The parameters by which a call's arguments are read.

    Attributes:
        names: of all parameters.
        positional: how many of them, the first ones, may be given by position.
        activations: those whose dimension 0 is the token dimension.
        automatic: whether other sizes and numbers become dynamic by themselves once they change.
        defaults: of parameters that a call may leave out. An op has none here: its kernel fills them in.
        rest: the parameter that takes further positional arguments.
        keywords: the parameter that takes further keyword arguments.
        objects: whether arguments may be objects, which are read attribute by attribute.
        written: the parameters that the implementation may write to; None if it may write to any.
        hidden: how many of them, the first ones, are variables that a function reads outside of itself.
        positional_only: those that a call cannot give by their names.
    """

    names: tuple[str, ...]
    positional: int
    activations: frozenset[str]
    automatic: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rest: str | None = None
    keywords: str | None = None
    objects: bool = False
    written: frozenset[str] | None = frozenset()
    hidden: int = 0
    positional_only: frozenset[str] = frozenset()

    @staticmethod
    def of(overload: OpOverload, activations: Sequence[str], automatic: bool = True) -> Parameters:
        """The parameters of an op. The dispatcher gives arguments by position, where that is allowed, and drops
        trailing ones that equal their defaults."""
        arguments = overload._schema.arguments
        return Parameters(
            names=tuple(a.name for a in arguments),
            positional=sum(not a.kwarg_only for a in arguments),
            activations=frozenset(activations),
            automatic=automatic,
            written=frozenset(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write),
        )

    @staticmethod
    def of_signature(
        signature: inspect.Signature,
        hidden: Sequence[str],
        activations: Sequence[str],
        automatic: bool,
        written: frozenset[str] | None,
    ) -> Parameters:
        """The parameters of a function, after ``hidden`` ones."""
        parameters = signature.parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return Parameters(
            names=(*hidden, *(p.name for p in named)),
            positional=len(hidden) + sum(p.kind is not p.KEYWORD_ONLY for p in named),
            activations=frozenset(activations),
            automatic=automatic,
            defaults={p.name: p.default for p in named if p.default is not p.empty},
            rest=next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None),
            keywords=next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None),
            objects=True,
            written=written,
            hidden=len(hidden),
            positional_only=frozenset(p.name for p in named if p.kind is p.POSITIONAL_ONLY),
        )


@dataclass(frozen=True, order=True)
class Step:
    """The way from an object to something that it holds.

    Attributes:
        name: of the attribute.
        holder: the attribute whose dictionary has it under its name, as a module's ``_parameters``.
    """

    name: str
    holder: str = ""

    def code(self, source: str, *, absent: bool = False) -> str:
        """The expression that reads it, where ``source`` is the object; if ``absent``, one that gives :data:`ABSENT`
        where there is no such thing."""
        name = repr(self.name)
        if self.holder:
            return f"{source}.{self.holder}.get({name}, ABSENT)" if absent else f"{source}.{self.holder}[{name}]"
        return f"getattr({source}, {name}, ABSENT)" if absent else f"{source}.{self.name}"

    def read(self, value: Any) -> Any:
        """What it leads to; :data:`ABSENT` if there is no such thing."""
        if self.holder:
            return getattr(value, self.holder).get(self.name, ABSENT)
        return getattr(value, self.name, ABSENT)


class _Absent(enum.Enum):
    ABSENT = "absent"


ABSENT = _Absent.ABSENT


@dataclass(frozen=True)
class Learned:
    """What earlier calls of an implementation taught of how to read the next.

    Attributes:
        dynamic: the leaves, by name, whose dimension 0, or whose value, has changed.
        fixed: the numbers that stay constants of the code although they change: it cannot be made otherwise.
        reads: what the implementation reads of the objects that it is given, as pairs of the object's name and a step.
    """

    dynamic: frozenset[str] = frozenset()
    fixed: frozenset[str] = frozenset()
    reads: frozenset[tuple[str, Step]] = frozenset()

    def __or__(self, more: Learned) -> Learned:
        return Learned(self.dynamic | more.dynamic, self.fixed | more.fixed, self.reads | more.reads)


NOTHING_LEARNED = Learned()


@dataclass(frozen=True)
class Leaf:
    """One tensor or constant among the arguments.

    Attributes:
        name: as a person writes it: ``x``, ``weights[1]``, ``self.eps``.
        source: its name in generated code.
        read: the expression by which generated code finds it; its source if it is an argument by itself.
        activation: whether it is, or is in, an activation.
        dynamic: whether code serves others: of a tensor, with another size in dimension 0; of a number, any other.
    """

    name: str
    source: str
    read: str
    value: Any
    activation: bool
    dynamic: bool

    @property
    def parameter(self) -> str:
        """The parameter that it belongs to."""
        return re.split(r"[.\[]", self.name, maxsplit=1)[0]

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.value, torch.Tensor)

    @property
    def is_dynamic_number(self) -> bool:
        return self.dynamic and not self.is_tensor

    @property
    def may_be_dynamic(self) -> bool:
        """Whether code may serve others; none and one are no sizes that do."""
        if self.is_tensor:
            return bool(self.value.dim() and self.value.size(0) >= 2)
        return type(self.value) in (int, float)


@dataclass(frozen=True)
class Group:
    """An argument, or part of one, that holds others.

    Attributes:
        name, source, read: as in :class:`Leaf`.
        kinds: the types that it may have.
        keys: of its items: of a list their numbers, of a dictionary its keys, of an object the steps that are read.
        owner: the object itself, if it is one, or a function's globals; None for a list or dictionary.
    """

    name: str
    source: str
    read: str
    kinds: tuple[type, ...]
    keys: tuple[Any, ...]
    items: tuple[Node, ...]
    owner: Any = None


Node = Leaf | Group


def nodes_of(node: Node) -> Iterator[Node]:
    """An argument and all that is in it, in order."""
    yield node
    if isinstance(node, Group):
        for item in node.items:
            yield from nodes_of(item)


def leaves_of(node: Node) -> Iterator[Leaf]:
    """The leaves of an argument, in order."""
    return (each for each in nodes_of(node) if isinstance(each, Leaf))


@dataclass(frozen=True)
class Root:
    """One argument, and how it is given: by position, by ``keyword``, or not at all, as its ``default``.

    Attributes:
        value: the default itself, where it is one.
    """

    node: Node
    keyword: str | None = None
    default: bool = False
    value: Any = None


# How an object is rebuilt around other values: from the group that it is, and its items by key.
Rebuild = Callable[[Group, Mapping[Any, Any]], Any]


@dataclass(frozen=True)
class Arguments:
    """A call's arguments as leaves, and the groups that those are in."""

    roots: tuple[Root, ...]
    nodes: tuple[Node, ...] = field(init=False)
    leaves: tuple[Leaf, ...] = field(init=False)
    tensors: tuple[Leaf, ...] = field(init=False)
    dynamic_numbers: tuple[Leaf, ...] = field(init=False)

    def __post_init__(self) -> None:
        nodes = tuple(node for root in self.roots for node in nodes_of(root.node))
        leaves = tuple(node for node in nodes if isinstance(node, Leaf))
        set_field = object.__setattr__  # the class is frozen
        set_field(self, "nodes", nodes)
        set_field(self, "leaves", leaves)
        set_field(self, "tensors", tuple(leaf for leaf in leaves if leaf.is_tensor))
        set_field(self, "dynamic_numbers", tuple(leaf for leaf in leaves if leaf.is_dynamic_number))

    @property
    def values(self) -> dict[str, Any]:
        """The leaves' values by source."""
        return {leaf.source: leaf.value for leaf in self.leaves}

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Arguments:
        """The same with other tensors in the places of the tensor leaves. An object keeps those that it has."""
        values = self.values_with(tensors)
        return Arguments(tuple(replace(root, node=_with_values(root.node, values)) for root in self.roots))

    def values_with(self, tensors: Sequence[Any], numbers: Sequence[Any] = ()) -> dict[str, Any]:
        """The values by source, with others for the tensor leaves, and for the dynamic numbers if given."""
        values = self.values
        values.update(zip((leaf.source for leaf in self.tensors), tensors, strict=True))
        values.update(zip((leaf.source for leaf in self.dynamic_numbers if numbers), numbers, strict=True))
        return values

    def rebuilt(
        self, values: Mapping[str, Any], rebuild: Rebuild = lambda group, items: group.owner, *, defaults: bool = False
    ) -> tuple[list[Any], dict[str, Any]]:
        """``args`` and ``kwargs`` of the call with these values of the leaves, and with those that it leaves out if
        ``defaults``. Objects are as they were unless ``rebuild`` makes them anew."""
        given = [root for root in self.roots if defaults or not root.default]
        args = [rebuilt(root.node, values, rebuild) for root in given if root.keyword is None]
        kwargs = {root.keyword: rebuilt(root.node, values, rebuild) for root in given if root.keyword is not None}
        return args, kwargs


def _with_values(node: Node, values: Mapping[str, Any]) -> Node:
    if isinstance(node, Leaf):
        return replace(node, value=values[node.source])
    return replace(node, items=tuple(_with_values(item, values) for item in node.items))


def rebuilt(node: Node, values: Mapping[str, Any], rebuild: Rebuild) -> Any:
    """An argument with these values of its leaves."""
    if isinstance(node, Leaf):
        return values[node.source]
    items = [rebuilt(item, values, rebuild) for item in node.items]
    if node.owner is not None:
        return rebuild(node, dict(zip(node.keys, items, strict=True)))
    kind = node.kinds[0]
    if issubclass(kind, dict):
        return kind(zip(node.keys, items, strict=True))
    return kind._make(items) if hasattr(kind, "_make") else kind(items)  # type: ignore[call-arg]


def flatten(
    parameters: Parameters, args: tuple[Any, ...], kwargs: Mapping[str, Any], learned: Learned = NOTHING_LEARNED
) -> Arguments:
    """Read the arguments of a call that the parameters admit."""
    reader = _Reader(parameters, learned)
    roots = []
    for i, value in enumerate(args):
        if i < parameters.positional:
            roots.append(Root(reader.argument(i, value)))
        else:
            rest = i - parameters.positional
            source = f"a{len(parameters.names)}_{rest}"
            roots.append(Root(reader.node(f"{parameters.rest}[{rest}]", source, source, value, parameters.rest)))
    indices = {name: i for i, name in enumerate(parameters.names)}
    for i, (name, value) in enumerate(kwargs.items()):
        if name in indices:
            roots.append(Root(reader.argument(indices[name], value), keyword=name))
        else:
            source = f"a{len(parameters.names) + 1}_{i}"
            roots.append(Root(reader.node(name, source, source, value, parameters.keywords), keyword=name))
    for name, value in parameters.defaults.items():
        if name not in kwargs and not indices[name] < min(len(args), parameters.positional):
            keyword = None if name in parameters.positional_only else name
            roots.append(Root(reader.argument(indices[name], value), keyword, default=True, value=value))
    return Arguments(tuple(roots))


def read(parameters: Parameters, learned: Learned, name: str, value: Any) -> Node:
    """Read one value by itself."""
    return _Reader(parameters, learned).node(name, "a", "a", value, None)


_Read = tuple[Any, str, str, Any]  # of what is in a group: its key, name, expression and value


@dataclass(frozen=True)
class _Reader:
    parameters: Parameters
    learned: Learned

    def argument(self, index: int, value: Any) -> Node:
        name = self.parameters.names[index]
        return self.node(name, f"a{index}", f"a{index}", value, name)

    def node(self, name: str, source: str, read: str, value: Any, parameter: str | None) -> Node:
        group = None if isinstance(value, (torch.Tensor, *CONSTANTS)) else self._group(name, source, value)
        if group is None:
            return self._leaf(name, source, read, value, parameter)
        kinds, owner, reads = group
        items = tuple(
            self.node(item_name, f"{source}_{i}", item_read, item, parameter)
            for i, (_, item_name, item_read, item) in enumerate(reads)
        )
        return Group(name, source, read, kinds, tuple(key for key, *_ in reads), items, owner)

    def _group(self, name: str, source: str, value: Any) -> tuple[tuple[type, ...], Any, list[_Read]] | None:
        """Kinds and owner of the group that a value is, and what is in it; None if it is read as one leaf."""
        objects, kinds = self.parameters.objects, (type(value),)
        if isinstance(value, (list, tuple)):
            reads = [(i, f"{name}[{i}]", f"{source}[{i}]", item) for i, item in enumerate(value)]
            return kinds if objects else (list, tuple), None, reads
        if objects and type(value) in (dict, OrderedDict) and all(type(key) in (str, int) for key in value):
            return kinds, None, [(k, f"{name}[{k!r}]", f"{source}[{k!r}]", item) for k, item in value.items()]
        return (kinds, value, [*self._attributes(name, source, value)]) if objects and is_readable(value) else None

    def _attributes(self, name: str, source: str, value: Any) -> Iterator[_Read]:
        steps = sorted(step for of, step in self.learned.reads if of == name)
        held = {step.name for step in steps if step.holder and step.read(value) is not ABSENT}
        for step in steps:
            if step.holder or step.name not in held:  # else both would lead to the same
                item = step.read(value)
                yield step, f"{name}.{step.name}", step.code(source, absent=item is ABSENT), item

    def _leaf(self, name: str, source: str, read: str, value: Any, parameter: str | None) -> Leaf:
        leaf = Leaf(name, source, read, value, parameter in self.parameters.activations, dynamic=False)
        learned = self.learned.dynamic if leaf.is_tensor else self.learned.dynamic - self.learned.fixed
        known = name in learned or (leaf.activation and leaf.is_tensor)
        return replace(leaf, dynamic=True) if known and leaf.may_be_dynamic else leaf


def is_readable(value: Any) -> bool:
    """Whether an object can be read attribute by attribute: a Python object whose attributes are in a dictionary."""
    slots = (vars(kind).get("__slots__", ()) for kind in type(value).__mro__)
    return (
        hasattr(value, "__dict__")
        and type(value).__module__.partition(".")[0] not in ("builtins", "types", "functools", "weakref")
        and not any(set([names] if isinstance(names, str) else names) - {"__dict__", "__weakref__"} for names in slots)
    )


TOKENS = "tokens"


def sizes(leaf: Leaf) -> tuple[int | str, ...]:
    """The sizes of a tensor leaf, with :data:`TOKENS` for the dynamic one."""
    shape = tuple(leaf.value.shape)
    return (TOKENS, *shape[1:]) if leaf.dynamic else shape


def strides(leaf: Leaf) -> tuple[int | tuple[str, int], ...]:
    """The strides of a tensor leaf; ``(TOKENS, k)`` stands for ``k`` times the number of tokens.

    In a column-major activation the outer strides grow with the number of tokens.
    """
    given: tuple[int, ...] = leaf.value.stride()
    if not leaf.dynamic or not given[0]:
        return given
    span = leaf.value.size(0) * given[0]
    return tuple(
        (TOKENS, stride // leaf.value.size(0)) if i and stride >= span and not stride % span else stride
        for i, stride in enumerate(given)
    )


def layout_with(leaf: Leaf, tokens: Any) -> tuple[list[Any], list[Any]]:
    """Size and stride of a tensor leaf with another number of tokens, which may be a symbol."""
    size = [tokens if isinstance(dim, str) else dim for dim in sizes(leaf)]
    stride = [tokens * dim[1] if isinstance(dim, tuple) else dim for dim in strides(leaf)]
    return size, stride


def with_tokens(leaf: Leaf, tokens: int, device: torch.device | None = None) -> torch.Tensor:
    """A tensor of zeros that is all else that a dynamic leaf would be with another number of tokens, on its device or
    another one."""
    value = leaf.value
    size, stride = layout_with(leaf, tokens)
    length = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else 0
    with torch.inference_mode(value.is_inference()):
        fresh = torch.zeros(length, dtype=value.dtype, device=device or value.device).as_strided(size, stride)
    return fresh.requires_grad_(value.requires_grad)


def activations_with_tokens(
    parameters: Parameters, arguments: Arguments, tokens: int
) -> tuple[list[Any], dict[str, Any]]:
    """``args`` and ``kwargs`` with activations of zeros that have another number of tokens, and else the same.

    Where activations are not declared, every tensor counts as one that has as many tokens as those whose names start
    with ``x``, or as the first tensor.

    Raises:
        ValueError: a negative number; no activation that has tokens, or several that have not as many.
    """
    if tokens < 0:
        raise ValueError(f"tokens must be 0 or more, not {tokens}")
    tensors = [leaf for leaf in arguments.tensors if leaf.value.dim()]
    activations = [leaf for leaf in tensors if leaf.activation]
    if parameters.automatic and not activations:
        activations = tensors[:1]
    counts = {leaf.name: leaf.value.size(0) for leaf in activations}
    if len(set(counts.values())) != 1:
        raise ValueError(f"the activations must have one number of tokens to replace, but they have {counts}")
    [count] = set(counts.values())
    if parameters.automatic:
        activations += [
            leaf for leaf in tensors if leaf.value.size(0) == count and not isinstance(leaf.value, torch.nn.Parameter)
        ]
    fresh = {leaf.source: with_tokens(replace(leaf, dynamic=True), tokens) for leaf in activations}
    return arguments.rebuilt({**arguments.values, **fresh})


def of_zeros(arguments: Arguments, devices: Sequence[torch.device]) -> Arguments:
    """The same arguments with tensors of zeros, which are laid out as those given are, on these devices."""
    tensors = zip(arguments.tensors, devices, strict=True)
    return arguments.with_tensors(
        [with_tokens(leaf, leaf.value.size(0) if leaf.dynamic else 0, device) for leaf, device in tensors]
    )
