"""Saved code: compiled specializations as data, and where a cache finds and keeps them.

An artifact is found by what it was made of (:mod:`._origin`) and by the key of its specialization. It is used where
its environment is the same, and where its guard on the dynamic sizes holds; anything else is compiled again.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._basics.errors import warn
from .._compile.inlining import Composition
from .._compile.program import Program
from .._compile.reading import CannotTell
from .._compile.specialization import Code
from .._compile.surroundings import Surroundings
from .._specialize.arguments import Arguments
from .._specialize.guards import holds
from .._specialize.key import Kind
from .._torch.capture import guard_functions
from .._torch.inductor import InductorCode
from .._torch.saved_code import TritonLaunch
from . import container
from .container import ArtifactError
from .origin import CannotSave, Origin, digest, environment, now
from .slicing import program_of

_log = logging.getLogger("dispatch_compile")

# Names the folder in which every cache looks for code and keeps what it compiles.
FOLDER_VARIABLE = "DISPATCH_COMPILE_CACHE_DIR"

_SUFFIX = ".saved"


@dataclass(frozen=True)
class Artifact:
    """One specialization as data: what it was made of, and its code.

    Attributes:
        origin: the implementation, and what was asked of the compiler.
        key: the specialization's key, as text.
        environment: what else must be the same where it runs.
        program: what runs. The rest are fields of :class:`._compilation.Code`.
    """

    origin: Origin
    key: str
    environment: Mapping[str, str]
    program: Program
    call: str
    source: str | None
    shape_guard: str | None
    result: str
    symbolic_shapes: str
    written: tuple[str, ...]
    fused: Mapping[str, str]  # as in a Composition, and so is the next
    asked: tuple[str, ...]
    surroundings: tuple[str, ...]  # the names of what it read of the program around it

    @staticmethod
    def of(origin: object, key: Hashable, code: Code) -> Artifact:
        """Take code apart.

        Args:
            origin: what it was made of; or a text that says why this is unknown.
            key: of its specialization.
            code: what to take apart.

        Raises:
            CannotTell: it is unknown what it was made of, or it contains something that exists only in this process.
        """
        if not isinstance(origin, Origin):
            raise CannotSave(str(origin))
        if isinstance(code.owner, Program):
            program = code.owner
        elif isinstance(code.owner, InductorCode):
            program = program_of(code.owner)
        else:
            raise CannotSave("its backend gave a function, not code")
        if code.result_names:
            raise CannotSave("its result has classes of its own")
        if code.written and program.realigned:
            raise CannotSave("it writes to arguments, which are copied where they are not aligned")
        composition = code.composition
        if composition.left:
            raise CannotSave(f"it calls {', '.join(composition.left)}")
        undescribed = sorted(set(composition.asked).difference(origin.ops.split()))
        if undescribed:
            raise CannotSave(f"it calls {', '.join(undescribed)} in a way that another process cannot compare")
        fields = {name: getattr(code, name) for name in _CODE_FIELDS}
        return Artifact(
            origin,
            key_text(key),
            environment(bool(program.cpp), frozenset(kernel.device for kernel in program.triton.values())),
            program,
            **fields,
            fused=composition.fused,
            asked=composition.asked,
            surroundings=code.surroundings.names(),
        )

    @property
    def identity(self) -> tuple[Hashable, ...]:
        """What no two artifacts of a collection have in common."""
        return self.origin, self.key, self.shape_guard, tuple(sorted(self.environment.items()))

    def differences(self) -> list[str]:
        """In what this process differs from the one that compiled."""
        compared = [(name, now(name), there) for name, there in self.environment.items()]
        return [f"{name} is {here!r}, not {there!r}" for name, here, there in compared if here != there]

    def admits(self, arguments: Arguments) -> bool:
        """Whether the code serves these arguments, which have its key."""
        return holds(self.shape_guard, arguments, guard_functions(self.shape_guard))

    def code(self) -> Code:
        """Load the code."""
        fields = {name: getattr(self, name) for name in _CODE_FIELDS}
        composition = Composition.again(self.fused, self.asked)
        surroundings = Surroundings.again(self.surroundings)
        run, owner = self.program.load(), self.program
        return Code(run=run, owner=owner, composition=composition, surroundings=surroundings, **fields)


_CODE_FIELDS = ("call", "source", "shape_guard", "result", "symbolic_shapes", "written")


def key_text(key: Hashable) -> str:
    """A specialization's key as text, in every process the same, and another one for every other key.

    Raises:
        CannotSave: the key holds an object that has no such text.
    """
    _check_plain(key)
    return repr(key)


def _check_plain(item: Hashable) -> None:
    if isinstance(item, Kind):
        item = item()
    if type(item) is tuple:
        for part in item:
            _check_plain(part)
    elif isinstance(item, type):
        if item.__module__ not in _SAME_EVERYWHERE:  # of its name there may be another class in another process
            raise CannotSave(f"its key holds the class {item.__qualname__}")
    elif type(item) not in _PLAIN:
        raise CannotSave(f"its key holds a {type(item).__name__}")


_SAME_EVERYWHERE = ("builtins", "collections", "torch")
_PLAIN = (str, bool, int, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class Artifacts:
    """Artifacts in memory, and a folder with one file for each of more of them."""

    def __init__(self, artifacts: Iterable[Artifact] = (), folder: Path | None = None) -> None:
        self._in_memory: dict[tuple[Origin, str], list[Artifact]] = {}
        for artifact in artifacts:
            self._in_memory.setdefault((artifact.origin, artifact.key), []).append(artifact)
        self._folder = folder

    @property
    def keeps(self) -> bool:
        """Whether there is a folder to keep more in."""
        return self._folder is not None

    @property
    def empty(self) -> bool:
        """Whether there is nowhere to find any."""
        return not self._in_memory and self._folder is None

    def __iter__(self) -> Iterator[Artifact]:
        """Those in memory."""
        for several in self._in_memory.values():
            yield from several

    def find(self, origin: Origin, key: Hashable, arguments: Arguments) -> Code | None:
        """Load code that was made of the same, and that serves these arguments.

        Code that cannot be used is skipped: with a warning, unless it was made in another environment.
        """
        try:
            text = key_text(key)
        except CannotTell:
            return None
        for artifact in self._candidates(origin, text):
            differences = artifact.differences()
            if differences:
                _log.info("saved code of %s is not used: %s", origin.op, "; ".join(differences))
            elif artifact.admits(arguments):
                try:
                    return artifact.code()
                except Exception as error:
                    warn(f"saved code of {origin.op} cannot be loaded, and is compiled again: {error}")
        return None

    def _candidates(self, origin: Origin, key: str) -> Iterator[Artifact]:
        yield from self._in_memory.get((origin, key), ())
        if self._folder is None:
            return
        for path in sorted(self._folder.glob(f"{_file_prefix(origin, key)}-*{_SUFFIX}")):
            try:
                found = read(path)
            except (OSError, ArtifactError) as error:
                warn(f"{error}; what is in it is compiled again")
                continue
            yield from (artifact for artifact in found if (artifact.origin, artifact.key) == (origin, key))

    def keep(self, artifact: Artifact) -> None:
        """Put an artifact into the folder, if there is one. A warning says if that fails."""
        if self._folder is None:
            return
        name = f"{_file_prefix(artifact.origin, artifact.key)}-{digest(repr(artifact.identity))[:16]}{_SUFFIX}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write(self._folder / name, [artifact])
        except OSError as error:
            warn(f"code of {artifact.origin.op} cannot be saved in {self._folder}: {error}")


def _file_prefix(origin: Origin, key: str) -> str:
    return digest(f"{origin!r} {key}")[:32]


def folder_from_environment() -> Path | None:
    """The folder that :data:`FOLDER_VARIABLE` names."""
    name = os.environ.get(FOLDER_VARIABLE)
    return Path(name) if name else None


def write(path: str | os.PathLike[str], artifacts: Iterable[Artifact]) -> None:
    """Put a file of these artifacts at ``path``; see :func:`.container.write`."""
    container.write(Path(path), list(map(_plain, artifacts)))


def read(path: str | os.PathLike[str], *, trust: bool = False) -> list[Artifact]:
    """The artifacts in a file; see :func:`.container.read`."""
    value = container.read(Path(path), trust=trust)
    try:
        return [_artifact(item) for item in value]
    except (TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path} holds something else than saved code: {error!r}") from error


def _plain(artifact: Artifact) -> dict[str, Any]:
    program = artifact.program
    triton = {name: launch._asdict() for name, launch in program.triton.items()}
    origin = dataclasses.asdict(artifact.origin)
    return {**vars(artifact), "origin": origin, "program": {**vars(program), "triton": triton}}


def _artifact(item: dict[str, Any]) -> Artifact:
    program = item["program"]
    triton = {name: TritonLaunch(**launch) for name, launch in program["triton"].items()}
    made = Program(**{**program, "triton": triton, "realigned": tuple(program["realigned"])})
    tuples = {name: tuple(item[name]) for name in ("written", "asked", "surroundings")}
    return Artifact(**{**item, **tuples, "origin": Origin(**item["origin"]), "program": made})
