"""How results are laid out: as eager lays them out, also where strides address nothing.

A stride of a dimension with one element, or of a tensor without elements, is never used to find an element. Compilers
choose such strides as they like, but people read them: kernels, ``as_strided``, assertions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from .._basics.nodes import op_or_none
from .._specialize.arguments import with_tokens
from .._torch.capture import at_least, size_at, size_text
from .._torch.dispatch import reinterpret_tensor
from .capture import Captured


@dataclass(frozen=True)
class Layout:
    """What a tensor is but for its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: torch.Tensor) -> Layout:
        return Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    @property
    def addressing(self) -> Layout:
        """The same without the strides that address nothing."""
        empty = 0 in self.shape
        strides = [0 if size == 1 or empty else step for size, step in zip(self.shape, self.strides, strict=True)]
        return replace(self, strides=tuple(strides))

    def __str__(self) -> str:
        return f"{self.dtype} of shape {list(self.shape)} and strides {list(self.strides)} on {self.device}"


def eager_layouts(graph: GraphModule, inputs: Sequence[Any]) -> list[Layout]:
    """How eager lays out the results of a captured graph for these inputs: it is run once, with eager's kernels.

    Raises:
        RuntimeError: an op's kernel gives other results than its meta kernel promised when the graph was captured, so
            that the implementation may go another way.
        Exception: what eager raises for these inputs.
    """
    return [Layout.of(result) for result in _AsPromised(graph).run(*inputs)]


def promised_layouts(captured: Captured) -> list[Layout]:
    """How the results are laid out for the call that the graph was captured for, by torch's meta kernels."""

    def numbers(sizes: Iterable[Any]) -> tuple[int, ...]:
        return tuple(size_at(size, captured.symbol_values) for size in sizes)

    return [Layout(numbers(o.shape), numbers(o.stride()), o.dtype, o.device) for o in captured.outputs]


class _AsPromised(Interpreter):
    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.extra_traceback = False  # would add to the texts of errors

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        op = op_or_none(n)
        if op is not None:
            for given, promised in zip(_tensors(result), _tensors(n.meta.get("val")), strict=True):
                if not _is_as(given, promised):
                    raise RuntimeError(
                        f"{op} gives {Layout.of(given)} where torch's meta kernel for it promises {Layout.of(promised)}"
                    )
        return result


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in values if isinstance(item, torch.Tensor)]


def _is_as(given: torch.Tensor, promised: torch.Tensor) -> bool:
    """Whether a tensor is what a fake promised, as far as the fake's sizes and strides are numbers."""
    if (given.dtype, given.device, given.dim()) != (promised.dtype, promised.device, promised.dim()):
        return False
    if any(isinstance(size, int) and size != now for size, now in zip(promised.shape, given.shape, strict=True)):
        return False
    return not _addresses_others(given, promised.stride())


def _addresses_others(tensor: torch.Tensor, strides: Iterable[Any]) -> bool:
    """Whether elements would lie elsewhere with these strides, as far as they are numbers."""
    return tensor.numel() > 0 and any(
        size > 1 and isinstance(wanted, int) and wanted != stride
        for size, stride, wanted in zip(tensor.shape, tensor.stride(), strides, strict=True)
    )


def corrections(captured: Captured, eager: Sequence[Layout], given: Sequence[Sequence[Any] | None]) -> list[str]:
    """Expressions for the strides that each result of compiled code must be given; ``None`` where it has eager's.

    Args:
        captured: the graph, of which the fakes tell strides at every number of tokens.
        eager: the results of eager for the call that it was captured for.
        given: the strides that the code is known to give; None for unknown ones, of which those count that address
            something.
    """
    texts = []
    for i, (fake, layout, known) in enumerate(zip(captured.outputs, eager, given, strict=True)):
        strides: Sequence[Any] = fake.stride()
        expressions = [size_text(stride, captured.symbols) for stride in strides]
        if [size_at(stride, captured.symbol_values) for stride in strides] != list(layout.strides):
            strides = expressions = _eagers_strides(captured, i, layout) or expressions
        elif known is None and all(at_least(size, 2) for size in fake.shape):
            known = strides
        right = known is not None and list(map(str, known)) == list(map(str, strides))
        texts.append("None" if right else f"({', '.join(expressions)},)")
    return texts


def _eagers_strides(captured: Captured, i: int, layout: Layout) -> list[str] | None:
    """Expressions for a result's strides, where fakes promise others than eager gives: with one element in a dimension,
    or none, eager's kernels do not all choose alike.

    If there is a number of tokens among them, eager runs for two more numbers, on zeros, and they are taken for what
    grows with it by as much each time. None if they do not.
    """
    fake = captured.outputs[i]
    if all(isinstance(dim, int) for dim in (*fake.shape, *fake.stride())):
        return list(map(str, layout.strides))
    counts = set(captured.symbol_values.values())
    if len(counts) != 1:
        return None
    [now] = counts
    try:
        after, later = (_strides_in_eager(captured, now + more)[i] for more in (1, 2))
    except Exception:  # eager does not take so many
        return None
    lines = [(start, next_ - start, last) for start, next_, last in zip(layout.strides, after, later, strict=True)]
    if any(start + 2 * slope != last for start, slope, last in lines):
        return None
    tokens = next(iter(captured.token_counts))
    return [f"{start - slope * now} + {slope} * {tokens}" if slope else str(start) for start, slope, _ in lines]


def _strides_in_eager(captured: Captured, tokens: int) -> list[tuple[int, ...]]:
    arguments = captured.arguments
    written = [leaf.source for leaf in captured.written]
    tensors = [
        with_tokens(leaf, tokens if leaf.dynamic else 0) if leaf.dynamic or leaf.source in written else leaf.value
        for leaf in arguments.tensors
    ]
    return [result.stride() for result in captured.graph(*captured.inputs_for(arguments.with_tensors(tensors)))]


def restrided(results: Sequence[torch.Tensor], strides: Sequence[tuple[int, ...] | None]) -> list[torch.Tensor]:
    """Compiled code's results with the strides that eager gives them, over the same memory; None leaves a result.

    Raises:
        RuntimeError: elements would lie elsewhere.
    """
    return [
        result if wanted is None or result.stride() == wanted else _restrided(result, wanted)
        for result, wanted in zip(results, strides, strict=True)
    ]


def _restrided(result: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    if _addresses_others(result, strides):
        raise RuntimeError(f"the code gives {Layout.of(result)}, which should have the strides {list(strides)}")
    return reinterpret_tensor(result, tuple(result.shape), strides)
