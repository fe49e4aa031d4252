"""All that a caller can see of a call, as facts that are equal or not and tensors to compare."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import GlobalStateGuard

from benchmarks.sweep_results import faults_of

Facts = dict[str, Any]


@dataclass
class Observation:
    """What a call came to.

    Attributes:
        error: the error that it raised, if any.
        facts: what is comparable by ``==``: types, layouts, flags, who shares memory with whom.
        values: tensors of which the values count, without those that have none.
    """

    error: Exception | None = None
    facts: Facts = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)


def observe(result: Any, arguments: Mapping[str, Tensor], memory: Sequence[Tensor]) -> Observation:
    """Look at a call that is over.

    Args:
        result: what it returned, or the error that it raised.
        arguments: the tensors that it was given, by name.
        memory: the tensors that these are views of, which no argument need show in full.
    """
    seen = Observation(error=result if isinstance(result, Exception) else None)
    seen.facts["state of the thread"] = _thread_state()
    seen.values["state of the random numbers"] = torch.default_generator.get_state()
    for name, tensor in arguments.items():
        _look_at(name, tensor, seen)
        if not tensor.is_inference():
            seen.facts[f"{name}: version"] = tensor._version
    for i, tensor in enumerate(memory):
        seen.values[f"memory {i}"] = _plain(tensor)
    if isinstance(result, Exception):
        seen.facts["error"] = (type(result), str(result))
        return seen
    results = {"result": result}
    if isinstance(result, (list, tuple)):
        seen.facts["result"] = (type(result), len(result))
        results = {f"result {i}": item for i, item in enumerate(result)}
    others = dict(arguments)
    for name, item in results.items():
        if isinstance(item, Tensor):
            _look_at(name, item, seen)
            seen.facts[f"{name}: same as"] = [other for other, tensor in others.items() if tensor is item]
            seen.facts[f"{name}: shares memory with"] = _sharing(item, others)
            others[name] = item
        else:
            seen.facts[name] = (type(item), repr(item))
    return seen


def differences(actual: Observation, expected: Observation, rounded: Collection[torch.dtype] = ()) -> list[str]:
    """In what two observations differ, for people.

    Args:
        actual: of a call in a mode.
        expected: of the same call in eager.
        rounded: dtypes whose values may differ by rounding, as the sweep has it; others must be equal in every bit.
    """
    found = [
        f"{name} is {actual.facts.get(name)!r} where eager gives {expected.facts.get(name)!r}"
        for name in {**expected.facts, **actual.facts}
        if actual.facts.get(name) != expected.facts.get(name)
    ]
    for name, values in expected.values.items():
        others = actual.values.get(name)
        if others is not None and not _same_values(others, values, rounded):
            found.append(f"{name}: {others} where eager gives {values}")
    return found


def _thread_state() -> dict[str, Any]:
    return {
        "keys included": torch._C._dispatch_tls_local_include_set().raw_repr(),
        "keys excluded": torch._C._dispatch_tls_local_exclude_set().raw_repr(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "dual level": torch.autograd.forward_ad._current_level,
        "global": GlobalStateGuard().__getstate__(),
        "inference mode": torch.is_inference_mode_enabled(),
    }


def _look_at(name: str, tensor: Tensor, seen: Observation) -> None:
    seen.facts.update(
        {
            f"{name}: type": type(tensor),
            f"{name}: dtype": tensor.dtype,
            f"{name}: device": tensor.device,
            f"{name}: layout": tensor.layout,
            f"{name}: shape": tuple(tensor.shape),
            f"{name}: strides": _strides(tensor),
            f"{name}: requires_grad": tensor.requires_grad,
            f"{name}: has a gradient": tensor.is_leaf and tensor.grad is not None,
            f"{name}: inference": tensor.is_inference(),
            f"{name}: lazily conjugated, negated": (tensor.is_conj(), tensor.is_neg()),
            f"{name}: zero tensor": tensor._is_zerotensor(),
        }
    )
    if name.startswith("result") and not (tensor.is_meta or tensor._is_zerotensor()):
        seen.values[name] = _plain(tensor)


def _strides(tensor: Tensor) -> list[int | None] | None:
    """The strides that mean something: those of dimensions with two elements or more, if there are any elements."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return None
    return [stride if size > 1 else None for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def _sharing(tensor: Tensor, others: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """With which tensors it shares its storage, and where in it it starts."""
    storage = _storage(tensor)
    if storage is None:
        return []
    return [(name, tensor.storage_offset()) for name, other in others.items() if _storage(other) == storage]


def _storage(tensor: Tensor) -> int | None:
    if tensor.layout is not torch.strided or tensor._is_zerotensor() or hasattr(tensor, "wrapped"):
        return None
    return tensor.untyped_storage()._cdata


def _plain(tensor: Tensor) -> Tensor:
    """The values in a tensor of any kind as a plain one; a copy, for what comes later may change it."""
    tensor = getattr(tensor, "wrapped", tensor)
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        tensor = tensor.detach().as_subclass(Tensor)
        return tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _same_values(actual: Tensor, expected: Tensor, rounded: Collection[torch.dtype]) -> bool:
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return True  # that is among the facts
    if actual.dtype in rounded:
        return not dict(faults_of(actual, expected))
    return torch.equal(_bits(actual), _bits(expected))


def _bits(tensor: Tensor) -> Tensor:
    """Every bit, so that 0.0 is not -0.0 and NaN equals itself."""
    return tensor.reshape(-1).view(torch.uint8)
