"""A cache that is saved by one process and loaded by another, which then compiles nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from children import printed_by
from torch import Tensor

import dispatch_compile as dc

pytestmark = [pytest.mark.long, pytest.mark.run_once]

PROGRAM = """if True:
    import sys
    import torch
    from torch import Tensor
    import dispatch_compile as dc

    @dc.register_op
    def scaled(x: Tensor, factor: float = FACTOR) -> tuple[Tensor, Tensor]:
        return torch.relu(x) * factor, x + ADDED

    ADDED = 1.5
    task, path, *numbers = sys.argv[1:]
    cache = dc.NativeCache.load(path) if task == "load" else dc.NativeCache()
    with torch.inference_mode(), dc.DispatchCompileMode(cache=cache):
        for tokens in map(int, numbers):
            for result in scaled(torch.arange(tokens * 3.0).view(tokens, 3)):
                print(result.sum().item(), tuple(result.shape), result.stride())
    if task == "save":
        cache.save(path)
    print(cache.stats().compiles, cache.stats().hits, "torch._dynamo" in sys.modules, "torch._inductor" in sys.modules)
"""


def run(task: str, path: Path, tokens: Sequence[int] = (0, 1, 2, 3, 500), factor: float = 2.0, **env: str) -> list[str]:
    """What the program printed: its results, and in the last line compilations, hits, and whether it imported Dynamo
    and Inductor."""
    program = PROGRAM.replace("FACTOR", str(factor))
    command = [sys.executable, "-c", program, task, str(path), *map(str, tokens)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


class Saved:
    """What a process left that compiled with the folder in its environment, and saved its cache too."""

    def __init__(self, path: Path) -> None:
        self.file, self.folder = path / "file", path / "code"
        *self.results, self.counts = run("save", self.file, DISPATCH_COMPILE_CACHE_DIR=str(self.folder))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))  # which only its user may write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def test_what_was_saved_is_loaded_without_the_compiler(saved):
    assert saved.counts == "3 5 True True"
    *results, counts = run("load", saved.file)
    assert counts == "0 5 False False"
    assert results == saved.results


def test_a_folder_is_filled_and_used(saved):
    assert len(os.listdir(saved.folder)) == 3
    *results, counts = run("use", saved.file, DISPATCH_COMPILE_CACHE_DIR=str(saved.folder))
    assert counts == "0 5 False False"
    assert results == saved.results


def test_another_default_is_another_implementation(saved):
    assert run("load", saved.file, tokens=[2], factor=3.0)[-1] == "1 1 True True"


def test_what_was_loaded_and_not_used_is_saved_again(saved, folder):
    dc.NativeCache.load(saved.file).save(folder / "again")
    assert run("load", folder / "again")[-1] == "0 5 False False"


def test_what_cannot_be_saved_is_left_out(folder, define_ir_op):
    weight = torch.ones(3)

    def weighted(x: Tensor) -> Tensor:
        return x * weight.shape[0]

    op, mode = define_ir_op(weighted), dc.DispatchCompileMode()
    with torch.inference_mode(), mode:
        op(torch.ones(4, 3))
        dc.ops.silu_and_mul(torch.ones(4, 6))
    mode.cache.save(folder / "file")
    cache = dc.NativeCache.load(folder / "file")
    with torch.inference_mode(), dc.DispatchCompileMode(cache=cache):
        dc.ops.silu_and_mul(torch.ones(4, 6))
        assert (cache.stats().compiles, cache.stats().loads) == (0, 1)
        op(torch.ones(4, 3))
        assert cache.stats().compiles == 1


class Layer:
    def __init__(self) -> None:
        self.weight = torch.ones(3)


@dc.native
def limited(x, limit):
    return torch.sigmoid(x) * limit


@dc.native
def weighted(x, layer):
    return x * layer.weight


def test_natives_are_saved_unless_they_take_an_object_of_some_class(folder, caplog):
    def call_both() -> None:
        limited(torch.ones(4, 3), 7.0)
        weighted(torch.ones(4, 3), Layer())

    with dc.DispatchCompileMode() as mode:
        call_both()
    mode.cache.save(folder / "file")
    assert "for [s0, 3], [3] is not saved: its key holds the class" in caplog.text
    cache = dc.NativeCache.load(folder / "file")
    with dc.DispatchCompileMode(cache=cache, trace=True) as mode:
        call_both()
    assert [(event.new, event.loaded) for event in mode.trace.events] == [(False, True), (True, False)]


def test_a_damaged_file(folder):
    (folder / "file").write_text("something else")
    with pytest.raises(dc.ArtifactError, match="is no file of saved code"):
        dc.NativeCache.load(folder / "file")


def test_a_call_that_loads_says_so(folder, define_ir_op):
    def tripled(x: Tensor) -> Tensor:
        return x * 3

    op, x = define_ir_op(tripled), torch.ones(4, 3)
    with dc.DispatchCompileMode() as mode:
        op(x)
    mode.cache.save(folder / "file")
    cache = dc.NativeCache.load(folder / "file")
    with dc.DispatchCompileMode(cache=cache, trace=dc.Trace()) as mode:
        foreseen = mode.explain(op, x)
        assert (foreseen.action, foreseen.new, foreseen.loaded) == ("compiled", False, True)
        assert "would run compiled; the code is saved, and loaded first" in str(foreseen)
        assert cache.stats().loads == 0, "explaining loads nothing into the cache"
        op(x)
        op(x)
    assert [(event.new, event.loaded) for event in mode.trace.events] == [(False, True), (False, False)]
    assert [str(event).partition("  # ")[2] for event in mode.trace.events] == [
        "compiled native, loaded: [s0, 3]",
        "compiled native, reused: [s0, 3]",
    ]
    assert cache.stats() == dc.CacheStats(compiles=0, hits=2, fallbacks=0, asides=0, loads=1)


def test_code_is_loaded_where_it_would_be_compiled_in_the_background(folder):
    op, x = dc.ops.silu_and_mul, torch.ones(4, 6)
    with dc.DispatchCompileMode() as mode:
        op(x)
    mode.cache.save(folder / "file")
    cache = dc.NativeCache.load(folder / "file")
    with dc.DispatchCompileMode(config=dc.CompileConfig(on_new="background"), cache=cache):
        op(x)
    assert cache.stats() == dc.CacheStats(compiles=0, hits=1, fallbacks=0, asides=0, loads=1)
    cache.clear()
    with dc.DispatchCompileMode(cache=cache):
        op(x)
    assert cache.stats().loads == 2, "what was loaded from the file is still there"


# ---- Compositions


COMPOSITION = """if True:
    import sys
    import torch
    from torch import Tensor
    import dispatch_compile as dc

    @dc.register_op
    def inner(x: Tensor) -> Tensor:
        return x + ADDED

    @inner.register_impl("other", supports_args=lambda x: x.shape[0] > LIMIT)
    def other(x: Tensor) -> Tensor:
        return x + 100

    @dc.register_op
    def outer(x: Tensor) -> Tensor:
        return CALLED(x) * 3

    LIMIT = 64
    task, path, *priority = sys.argv[1:]
    inner.set_default(priority)
    cache = dc.NativeCache.load(path) if task == "load" else dc.NativeCache()
    mode = dc.DispatchCompileMode(cache=cache, trace=True, config=dc.CompileConfig(providers=PROVIDERS))
    with torch.inference_mode(), mode:
        print(outer(torch.ones(4, 3)).unique().tolist(), *mode.trace.events[0].fuses)
        if task == "save":
            cache.save(path)
        inner.set_default(["other", "native"])
        LIMIT = 2
        print(outer(torch.ones(4, 3)).unique().tolist())
    print(cache.stats().compiles, cache.stats().loads)
"""


def run_composition(
    task: str,
    path: Path,
    *priority: str,
    added: float = 1.0,
    called: str = "inner",
    providers: Sequence[str] = ("native",),
    limit: int = 64,
) -> list[str]:
    program = COMPOSITION.replace("ADDED", str(added)).replace("CALLED", called).replace("PROVIDERS", str(providers))
    program = program.replace("LIMIT = 64", f"LIMIT = {limit}")
    return printed_by(program, [task, str(path), *priority]).splitlines()


@pytest.fixture(scope="module")
def composition(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("composition") / "file"
    assert run_composition("save", path) == ["[6.0] inner", "[303.0]", "2 0"]
    return path


@pytest.mark.parametrize("called", ["inner", "torch.ops.dispatch_compile.inner"])
def test_a_composition_is_loaded_and_its_priorities_are_guarded(composition, called, folder):
    path = composition
    if called != "inner":
        path = folder / "file"
        run_composition("save", path, called=called)
    assert run_composition("load", path, called=called) == ["[6.0] inner", "[303.0]", "1 1"]


def test_another_inner_implementation_is_another_composition(composition):
    assert run_composition("load", composition, added=2.0) == ["[9.0] inner", "[303.0]", "2 0"]
    assert run_composition("load", composition, "other", "native") == ["[6.0] inner", "[303.0]", "2 0"]
    both = ("native", "other")
    assert run_composition("load", composition, providers=both) == ["[6.0] inner", "[303.0]", "1 1"]


def test_what_a_supports_args_reads_is_part_of_what_code_is_made_of(folder):
    priority = ("other", "native")
    run_composition("save", folder / "file", *priority)
    assert run_composition("load", folder / "file", *priority) == ["[6.0] inner", "[303.0]", "1 1"]
    assert run_composition("load", folder / "file", *priority, limit=32) == ["[6.0] inner", "[303.0]", "2 0"]


def test_code_that_calls_an_op_is_not_saved(folder):
    run_composition("save", folder / "file", "other", limit=2)
    assert run_composition("load", folder / "file", "other", limit=2)[-1] == "1 0"
