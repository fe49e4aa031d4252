"""What is known for one key: code and the guards under which it may run, or why there is no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .._specialize.arguments import Arguments
from .._specialize.change import Pattern, pattern_of
from .._specialize.difference import Components, components_of, in_names
from .._specialize.guards import GuardedCall, guarded, holds
from .._specialize.memory import apart, sharing
from .._torch.capture import guard_functions
from .capture import float_tensor
from .inlining import NO_CALLS, Composition
from .layouts import restrided
from .outcome import Aside, Eager, Failed
from .program import Run
from .surroundings import NOTHING_READ, Surroundings


@dataclass(frozen=True)
class Code:
    """Compiled code for one specialization."""

    run: Run  # takes a list that it may empty
    call: str  # expression for the output tensors, in terms of `names` and the leaves' sources
    source: str | None  # the text of the generated code, if the backend generates any
    shape_guard: str | None  # what must hold of the dynamic sizes
    result: str  # expression that makes the op's result of `out`, the list of output tensors
    symbolic_shapes: str
    written: tuple[str, ...] = ()  # sources of the arguments that it writes to
    result_names: Mapping[str, Any] = field(default_factory=dict)  # what `result` refers to
    owner: object = None  # releases the code when it is freed, or can make it again
    path: str | None = None  # the file that the backend wrote `source` to
    composition: Composition = NO_CALLS  # what became of calls of IR ops; the code is right while that holds
    surroundings: Surroundings = NOTHING_READ  # and while this does: what a function reads of the program around it

    def is_valid(self) -> bool:
        """Whether everything that it was made of is unchanged."""
        return self.composition.holds() and self.surroundings.hold()

    @property
    def names(self) -> dict[str, Any]:
        """What the expressions refer to, beside the leaves' sources."""
        own = {"run": self.run, "restrided": restrided, "float_tensor": float_tensor}
        return {**guard_functions(self.shape_guard), **self.result_names, **own}


@dataclass(frozen=True)
class Specialization:
    """Code for one key, with the guards under which it may run.

    It refers to nothing of the implementation that it was made of, so that a cache can be keyed weakly by it.
    """

    code: Code
    components: Components  # what the key is made of, for people
    pattern: Pattern  # the same, leaf by leaf
    guard: str | None  # what must hold of the dynamic sizes, in the parameters' names
    origin: object  # what the code was made of, for who saves it

    @staticmethod
    def of(code: Code, arguments: Arguments, origin: object) -> Specialization:
        """The specialization of such arguments, for which there is code."""
        guard = in_names(code.shape_guard, arguments)
        components = {**components_of(arguments), **code.composition.components()}
        return Specialization(code, components, pattern_of(arguments), guard, origin)

    def admits(self, arguments: Arguments) -> bool:
        """Whether the guards hold, on dynamic sizes and on the ops called inside, for arguments that have the key."""
        guard = self.code.shape_guard
        return self.code.is_valid() and holds(guard, arguments, guard_functions(guard))

    def why_not(self) -> str:
        """Why it does not serve a call that has its key."""
        if self.code.is_valid():
            return f"the sizes do not satisfy {self.guard}"
        if self.code.composition.holds():
            return f"{self.code.surroundings.changed()} has changed"
        return "what the dispatch of the ops inside goes by has changed"

    def why_aside(self, arguments: Arguments) -> str | None:
        """Why the code may not run for arguments that it admits; None if it may."""
        written = self.code.written
        shared = sharing((leaf for leaf in arguments.tensors if leaf.source in written), arguments.tensors)
        return None if shared is None else f"{shared[0].name}, which is written, shares memory with {shared[1].name}"

    def guarded_call(self, arguments: Arguments, *, of_function: bool) -> GuardedCall:
        """``call(args, kwargs)`` that runs the code for arguments like these, and gives MISS for any other."""
        code = self.code
        composed = "composition_holds()" if code.composition.asked else None
        unchanged = "surroundings_hold()" if code.surroundings else None
        guard = " and ".join(filter(None, [code.shape_guard, *_separate(code, arguments), composed, unchanged])) or None
        names = {**code.names, "apart": apart, "changed": torch.autograd.graph.increment_version}
        names["composition_holds"] = code.composition.holds
        names["surroundings_hold"] = code.surroundings.hold
        counted = [leaf.source for leaf in arguments.tensors if not leaf.value.is_inference()]
        changed = [f"changed({source})" for source in code.written if source in counted]
        result = [f"out = {code.call}", *changed, f"return {code.result}"]
        return guarded(arguments, guard, result, names, of_function=of_function)


@dataclass(frozen=True)
class NoCode:
    """There is no code for one key, and this is what its calls do instead.

    Attributes:
        components: what the key is made of, for people.
        outcome: what all calls that have the key come to.
    """

    components: Components
    outcome: Aside | Eager | Failed

    @staticmethod
    def of(arguments: Arguments, outcome: Aside | Eager | Failed) -> NoCode:
        return NoCode(components_of(arguments), outcome)

    def admits(self, arguments: Arguments) -> bool:
        return True

    def why_not(self) -> str:
        return self.outcome.reason

    def guarded_call(self, arguments: Arguments, *, of_function: bool) -> GuardedCall:
        """``call(args, kwargs)`` that gives None for arguments like these, and MISS for any other."""
        several = [f"2 <= {leaf.source}.size(0)" for leaf in arguments.tensors if leaf.dynamic]
        return guarded(arguments, " and ".join(several) or None, ["return None"], {}, of_function=of_function)


def _separate(code: Code, arguments: Arguments) -> list[str]:
    """Conditions that no argument that is written shares memory with another."""
    sources = [leaf.source for leaf in arguments.tensors]
    written = [source for source in sources if source in code.written]
    return [f"apart({one}, {other})" for one in written for other in sources if other != one]
