"""``forward_native`` of a ``CustomOp`` in one configuration, taken from its instance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.library import infer_schema

from .._basics.errors import first_line
from .._specialize.arguments import Parameters, flatten
from .._torch.capture import new_fake_mode
from .._torch.dispatch import without_modes
from ._configuration import NotAnOp
from ._results import Results


class Native:
    """``forward_native`` as a function of its arguments alone.

    It works on a stand-in with a copy of the instance's attributes, so that it keeps no instance alive.

    Attributes:
        call: the function.
        parameters: the names of its parameters.
        schema: its parameters, as a torch schema writes them.

    Raises:
        NotAnOp: torch has no schema for its signature.
    """

    def __init__(self, instance: nn.Module, function: Callable[..., Any], configuration: Mapping[str, Any]) -> None:
        stand_in = object.__new__(type(instance))
        vars(stand_in).update(vars(nn.Module()), **configuration)
        static = not inspect.ismethod(instance.forward_native)
        self.call: Callable[..., Any] = function if static else function.__get__(stand_in)
        try:
            signature = inspect.signature(self.call, eval_str=True)
            self.schema = infer_schema(_stub(signature), mutates_args=()).partition(" -> ")[0]
        except (NameError, ValueError) as error:
            raise NotAnOp(f"its type hints make no schema ({first_line(error)})") from error
        self.parameters = list(signature.parameters)

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by parameter."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def results(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Results:
        """What this call would return, found out on fake tensors.

        Raises:
            NotAnOp: an op cannot return it, or forward_native fails.
        """
        try:
            names = tuple(self.parameters)
            arguments = flatten(Parameters(names, len(names), frozenset()), args, kwargs)
            with without_modes(), new_fake_mode(None):
                fakes = [
                    torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device)
                    for t in (leaf.value for leaf in arguments.tensors)
                ]
                fake_args, fake_kwargs = arguments.rebuilt(arguments.values_with(fakes))
                return Results.of(self.call(*fake_args, **fake_kwargs), self.named(fake_args, fake_kwargs))
        except NotAnOp:
            raise
        except Exception as error:
            raise NotAnOp(f"forward_native cannot be tried on fake tensors ({first_line(error)})") from error


def _stub(signature: inspect.Signature) -> Callable[[], None]:
    """A function whose type hints are a signature's, but for the result's: not every layer has one."""

    def stub() -> None: ...

    stub.__signature__ = signature.replace(return_annotation=None)  # type: ignore[attr-defined]
    return stub


def activations_of(instance: nn.Module, parameters: Sequence[str]) -> list[str]:
    """The parameters of ``forward_native`` whose dimension 0 is the token dimension.

    Raises:
        NotAnOp: there are none, or vLLM was told that another dimension is dynamic.
    """
    dims = getattr(type(instance), "_dynamic_arg_dims", None)  # what CustomOp.register was given
    if dims is None:
        activations = [name for name in parameters if name.startswith("x")]
    else:
        others = {name: dim for name, dim in dims.items() if dim not in (0, [0])}
        if others:
            raise NotAnOp(f"of its dynamic_arg_dims {others} are not dimension 0")
        activations = [name for name in parameters if name in dims]
    if not activations:
        raise NotAnOp("it has no activation: no parameter's name starts with x, and none is in dynamic_arg_dims")
    return activations
