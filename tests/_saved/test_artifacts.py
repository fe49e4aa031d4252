"""Compiled code that is saved, and found and run again: in this process, and in one that never imports Inductor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import types
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import EAGER, specializations
from torch import Tensor

import dispatch_compile as dc
from dispatch_compile._compile.program import ALIGNMENT, Program
from dispatch_compile._compile.specialization import Code, Specialization
from dispatch_compile._saved import container as _saved_file
from dispatch_compile._saved import origin as _origin
from dispatch_compile._saved.artifacts import Artifact, Artifacts, folder_from_environment, key_text, read, write
from dispatch_compile._saved.container import ArtifactError
from dispatch_compile._saved.origin import CannotSave, origin_of
from dispatch_compile._specialize.arguments import Arguments, Parameters, flatten
from dispatch_compile._specialize.key import key_of
from dispatch_compile._torch.saved_code import TritonLaunch

pytestmark = pytest.mark.run_once

OP = dc.ops.silu_and_mul


def arguments_of(op: Any, *args: Any) -> Arguments:
    return flatten(Parameters.of(op.torch_op, op.activations), args, {})


def compiled(op: Any, *args: Any, config: dc.CompileConfig | None = None) -> Code:
    """The code that a mode makes for a call."""
    mode = dc.DispatchCompileMode(config=config)
    with mode:
        op(*args)
    [specialization] = specializations(mode, op)
    return specialization.code


def run(code: Code, arguments: Arguments) -> Tensor:
    args, kwargs = arguments.rebuilt(arguments.values)
    call = Specialization.of(code, arguments, "a test").guarded_call(arguments, of_function=False)
    return call(tuple(args), kwargs)


class Saved:
    """One artifact, with what it was made for."""

    def __init__(self) -> None:
        self.x = torch.arange(-40, 40).reshape(4, 20) / 8
        self.arguments = arguments_of(OP, self.x)
        self.key = key_of(self.arguments)
        self.origin = origin_of(OP.torch_op._schema.name, OP.impls["native"], dc.CompileConfig())
        self.code = compiled(OP, self.x)
        self.artifact = Artifact.of(self.origin, self.key, self.code)
        self.result = run(self.code, self.arguments)

    def find_in(self, artifacts: Artifacts) -> Code | None:
        return artifacts.find(self.origin, self.key, self.arguments)


@pytest.fixture(scope="module")
def saved() -> Saved:
    return Saved()


@pytest.fixture
def folder(tmp_path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


# ---- The program


def test_code_that_was_read_from_a_file_gives_the_same_result(saved, folder):
    write(folder / "file", [saved.artifact])
    code = saved.find_in(Artifacts(read(folder / "file")))
    assert code is not None
    assert code.run is not saved.code.run
    assert "silu" in " ".join(saved.artifact.program.cpp)
    assert torch.equal(run(code, saved.arguments), saved.result)
    more = arguments_of(OP, torch.randn(333, 20))
    assert torch.equal(run(code, more), run(saved.code, more)), "dimension 0 is still dynamic"
    assert (code.source, code.symbolic_shapes) == (saved.code.source, saved.code.symbolic_shapes)


def test_the_program_leaves_inductor_behind(saved):
    assert "torch._inductor" in saved.code.source
    text = saved.artifact.program.text
    assert "_inductor" not in text
    assert "async_compile" not in text
    assert "benchmark" not in text


def test_what_was_loaded_can_be_saved_again(saved, folder):
    again = Artifact.of(saved.origin, saved.key, saved.artifact.code())
    assert again == saved.artifact
    write(folder / "file", [again])
    assert read(folder / "file") == [saved.artifact]


def test_another_process_runs_it_without_inductor(saved, folder):
    write(folder / "file", [saved.artifact])
    program = """if True:
        import sys
        import torch
        import dispatch_compile as dc
        from dispatch_compile._saved.artifacts import Artifacts, read
        from dispatch_compile._saved.origin import origin_of
        from dispatch_compile._compile.specialization import Specialization
        from dispatch_compile._specialize.arguments import Parameters, flatten
        from dispatch_compile._specialize.key import key_of
        op = dc.ops.silu_and_mul
        x = torch.arange(-40, 40).reshape(4, 20) / 8
        torch.set_num_threads(int(sys.argv[2]))
        arguments = flatten(Parameters.of(op.torch_op, op.activations), (x,), {})
        origin = origin_of(op.torch_op._schema.name, op.impls["native"], dc.CompileConfig())
        code = Artifacts(read(sys.argv[1])).find(origin, key_of(arguments), arguments)
        call = Specialization.of(code, arguments, origin).guarded_call(arguments, of_function=False)
        print(call((x,), {}).tolist())
        print(sorted({"torch._inductor", "torch._dynamo", "sympy", "triton"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder / "file"), str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        check=True,
    )
    result, imported = map(json.loads, done.stdout.splitlines())
    assert result == saved.result.tolist()
    assert imported == []


def test_code_that_calls_torchs_own_kernels(define_ir_op):
    def product(x: Tensor, w: Tensor) -> Tensor:
        return torch.relu(x @ w)

    op, args = define_ir_op(product), (torch.randn(3, 4), torch.randn(4, 5))
    code, arguments = compiled(op, *args), arguments_of(op, *args)
    origin = origin_of(op.torch_op._schema.name, op.impls["native"], dc.CompileConfig())
    loaded = Artifact.of(origin, key_of(arguments), code).code()
    assert torch.equal(run(loaded, arguments), run(code, arguments))


def test_several_kernels_and_results():
    op, args = dc.ops.quant_fp8_per_token, (torch.randn(5, 64),)
    code, arguments = compiled(op, *args), arguments_of(op, *args)
    origin = origin_of(op.torch_op._schema.name, op.impls["native"], dc.CompileConfig())
    loaded = Artifact.of(origin, key_of(arguments), code).code()
    for one, other in zip(run(loaded, arguments), run(code, arguments), strict=True):
        assert torch.equal(one.float(), other.float())


def test_inputs_are_aligned_where_the_kernels_need_it():
    text = "def call(inputs): return inputs"
    memory = torch.arange(40.0)
    aligned, misaligned = memory[4:12].view(2, 4), memory[1:21].as_strided((3, 4), (1, 4))
    program = Program(text, realigned=(1, 2))
    inputs = program.load()([7, aligned, misaligned])
    assert inputs[0] == 7
    assert inputs[1] is aligned
    assert misaligned.data_ptr() % ALIGNMENT
    assert not inputs[2].data_ptr() % ALIGNMENT
    assert torch.equal(inputs[2], misaligned)
    assert inputs[2].stride() == misaligned.stride()
    empty = torch.empty(9)[1:].view(4, 2)[:0]
    assert program.load()([7, aligned, empty])[2].shape == (0, 2)


def test_code_of_another_backend_cannot_be_saved(saved):
    code = compiled(OP, saved.x, config=EAGER)
    with pytest.raises(CannotSave, match="a function, not code"):
        Artifact.of(saved.origin, saved.key, code)


def test_code_that_was_given_a_constant_cannot_be_saved(saved, monkeypatch):
    module = saved.code.run.__func__.__globals__
    monkeypatch.setitem(module, "empty_strided_cpu", torch.ones(2))
    with pytest.raises(CannotSave, match="constant empty_strided_cpu is a Tensor"):
        Artifact.of(saved.origin, saved.key, saved.code)


def test_code_with_a_kernel_of_another_kind_cannot_be_saved(saved, monkeypatch):
    module = saved.code.run.__func__.__globals__
    [kernel] = saved.artifact.program.cpp
    monkeypatch.setitem(module, kernel, lambda *args: None)
    with pytest.raises(CannotSave, match=f"{kernel} \\(cpp_pybinding\\) cannot be taken out"):
        Artifact.of(saved.origin, saved.key, saved.code)


def test_code_in_a_wrapper_cannot_be_saved(saved, monkeypatch):
    monkeypatch.setattr(saved.code.owner, "run", lambda inputs: saved.code.run(inputs))
    with pytest.raises(CannotSave, match="wrapped"):
        Artifact.of(saved.origin, saved.key, saved.code)


# ---- What is found


def test_nothing_else_is_found(saved):
    artifacts = Artifacts([saved.artifact])
    assert saved.find_in(artifacts) is not None
    for field in ("op", "provider", "implementation", "options", "settings"):
        other = replace(saved.origin, **{field: "another"})
        assert artifacts.find(other, saved.key, saved.arguments) is None, field
    others = {
        "size": saved.x[:, :10],
        "dtype": saved.x.double(),
        "stride": saved.x.t().contiguous().t(),
        "one token": saved.x[:1],
        "no tokens": saved.x[:0],
    }
    for what, x in others.items():
        arguments = arguments_of(OP, x)
        assert artifacts.find(saved.origin, key_of(arguments), arguments) is None, what
    with torch.no_grad():
        assert artifacts.find(saved.origin, key_of(saved.arguments), saved.arguments) is None, "grad mode"


@pytest.mark.parametrize("name", ["dispatch_compile", "python", "torch", "cpu", "compiler"])
def test_code_of_another_environment_is_not_used(saved, caplog, monkeypatch, name):
    artifacts = Artifacts([saved.artifact])
    here = _origin.now
    monkeypatch.setattr("dispatch_compile._saved.artifacts.now", lambda item: "other" if item == name else here(item))
    with caplog.at_level("INFO", logger="dispatch_compile"):
        assert saved.find_in(artifacts) is None
    assert f"{name} is 'other', not {saved.artifact.environment[name]!r}" in caplog.text


def test_guards_on_the_sizes_choose(saved):
    few = replace(saved.artifact, shape_guard="a0.size(0) <= 4", symbolic_shapes="few")
    many = replace(saved.artifact, shape_guard="math.floor(a0.size(0) / 5) >= 1", symbolic_shapes="many")
    artifacts = Artifacts([many, few])
    found = {
        tokens: artifacts.find(saved.origin, saved.key, arguments_of(OP, torch.randn(tokens, 20)))
        for tokens in (2, 4, 5, 90)
    }
    assert {tokens: code and code.symbolic_shapes for tokens, code in found.items()} == {
        2: "few",
        4: "few",
        5: "many",
        90: "many",
    }


def test_code_that_cannot_be_loaded_is_left(saved):
    program = replace(saved.artifact.program, cpp=dict.fromkeys(saved.artifact.program.cpp, b"no library"))
    artifacts = Artifacts([replace(saved.artifact, program=program), saved.artifact])
    with pytest.warns(dc.DispatchCompileWarning, match="silu_and_mul cannot be loaded, and is compiled again"):
        code = saved.find_in(artifacts)
    assert code is not None, "the next one is tried"


@pytest.mark.parametrize(
    "change",
    [
        lambda args: (args[0], torch.device("cpu")),
        lambda args: (args[0], torch.float16, None, True, 3, "text", 2.5, 1 + 2j),
    ],
)
def test_keys_are_plain_data(change):
    x = torch.randn(4, 20)
    names = tuple("abcdefgh")
    keys = [
        key_of(flatten(Parameters(names, len(names), frozenset("a")), change((value,)), {})) for value in (x, x.clone())
    ]
    assert key_text(keys[0]) == key_text(keys[1])
    with_another = key_of(flatten(Parameters(names, len(names), frozenset("a")), change((x[:, :1],)), {}))
    assert key_text(with_another) != key_text(keys[0])


def test_a_key_with_an_object_has_no_text(saved):
    with pytest.raises(CannotSave, match="holds a object"):
        key_text((1, ("x", object())))
    assert Artifacts([saved.artifact]).find(saved.origin, (object(),), saved.arguments) is None


def test_a_key_with_a_class_of_ones_own_has_no_text():
    """In another process the class of that name may be another one, and code is made of what it has."""
    plain = (float, str, tuple, dict, OrderedDict, type(None), torch.dtype, torch.device, torch.Size)
    assert key_text(plain)
    with pytest.raises(CannotSave, match="its key holds the class Saved"):
        key_text((1, (Saved, "x")))


# ---- Files


def test_files_hold_what_was_written(saved, folder):
    launch = TritonLaunch(b"cubin", "kernel", 0, 16, 4, "OOl", 1, b"grid")
    program = Program("def call(inputs): pass", {"one": b"1", "same": b"1"}, {"three": launch}, (0, 2))
    other = replace(saved.artifact, program=program, source=None, shape_guard=None, written=("a0",), asked=("a::b",))
    write(folder / "file", [saved.artifact, other])
    assert read(folder / "file") == [saved.artifact, other]
    assert os.stat(folder / "file").st_mode & 0o777 == 0o600


def _header_end(content: bytes) -> int:
    return content.index(b"\n", len(_saved_file.MAGIC)) + 1


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda whole: b"", "is no file of saved code"),
        (lambda whole: b"\x80\x04import os\n" + whole, "is no file of saved code"),
        (lambda whole: whole[: len(_saved_file.MAGIC) - 1], "is no file of saved code"),
        (lambda whole: whole[: len(_saved_file.MAGIC)], "its header cannot be read"),
        (lambda whole: whole[: len(_saved_file.MAGIC) + 20], "its header cannot be read"),
        (lambda whole: whole[: _header_end(whole)], r"it holds 0 of \d+ bytes"),
        (lambda whole: whole[:-1], r"it holds \d+ of \d+ bytes"),
        (lambda whole: whole + b"!", r"it holds \d+ of \d+ bytes"),
        (lambda whole: whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:], "not what was written"),
        (lambda whole: whole.replace(b'"format": 2', b'"format": 3', 1), "has format 3.*reads format 2"),
        (lambda whole: whole.replace(b'"format": 2', b'"formal": 2', 1), "its header cannot be read"),
    ],
)
def test_damaged_and_foreign_files(saved, folder, damage, why):
    path = folder / "file"
    write(path, [saved.artifact])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtifactError, match=why) as raised:
        read(path)
    assert str(path) in str(raised.value)


def test_a_whole_file_of_something_else(folder):
    _saved_file.write(folder / "file", [{"origin": "elsewhere"}])
    with pytest.raises(ArtifactError, match="something else than saved code"):
        read(folder / "file")


def test_a_write_that_fails_leaves_what_was_there(saved, folder, monkeypatch):
    write(folder / "file", [saved.artifact])

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            write(folder / "file", [])
    assert read(folder / "file") == [saved.artifact]
    assert os.listdir(folder) == ["file"]


def test_processes_that_write_at_once_leave_a_whole_file(folder):
    writer = """if True:
        import sys
        from pathlib import Path
        from dispatch_compile._saved import container as _saved_file
        print("ready", flush=True)
        sys.stdin.readline()
        for i in range(300):
            _saved_file.write(Path(sys.argv[1]), [sys.argv[2], bytes([i % 256]) * 100_000])
    """
    path = folder / "file"
    _saved_file.write(path, ["before", b"\0" * 100_000])
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", writer, str(path), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in ("one", "two")
    ]
    for process in writers:
        assert process.stdout.readline() == "ready\n"
    for process in writers:
        process.stdin.write("go\n")
        process.stdin.flush()
    seen = set()
    while any(process.poll() is None for process in writers):
        name, content = _saved_file.read(path)
        assert len(set(content)) == 1
        seen.add(name)
    assert [process.wait() for process in writers] == [0, 0]
    assert {"one", "two"} <= seen
    assert os.listdir(folder) == ["file"]
    for process in writers:
        process.stdin.close()
        process.stdout.close()


# ---- Trust


def _owned_by_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(path, 4321, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
@pytest.mark.parametrize("which", ["file", "folder"])
def test_what_others_may_write_is_not_read(saved, folder, mode, which):
    write(folder / "file", [saved.artifact])
    (folder / "file" if which == "file" else folder).chmod(mode | 0o100)
    try:
        with pytest.raises(ArtifactError, match="can be written by other users"):
            read(folder / "file")
        assert read(folder / "file", trust=True) == [saved.artifact]
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("which", ["file", "folder"])
def test_what_belongs_to_another_user_is_not_read(saved, folder, monkeypatch, which):
    write(folder / "file", [saved.artifact])
    _owned_by_another(folder / "file" if which == "file" else folder, monkeypatch)
    with pytest.raises(ArtifactError, match="belongs to another user"):
        read(folder / "file")
    assert read(folder / "file", trust=True) == [saved.artifact]


def test_a_sticky_folder_is_safe(saved, folder):
    write(folder / "file", [saved.artifact])
    folder.chmod(0o1777)
    assert read(folder / "file") == [saved.artifact]


# ---- Folders


def test_a_folder_keeps_and_finds(saved, folder):
    place = folder / "made" / "when needed"
    Artifacts(folder=place).keep(saved.artifact)
    assert place.stat().st_mode & 0o777 == 0o700
    code = saved.find_in(Artifacts(folder=place))
    assert code is not None
    assert torch.equal(run(code, saved.arguments), saved.result)
    assert Artifacts(folder=place).find(saved.origin, ("other",), saved.arguments) is None


def test_a_folder_has_a_file_for_each_artifact(saved, folder):
    artifacts = Artifacts(folder=folder)
    elsewhere = replace(saved.artifact, environment={"torch": "another"})
    with_another_guard = replace(saved.artifact, shape_guard="a0.size(0) > 4")
    for artifact in (saved.artifact, elsewhere, with_another_guard, saved.artifact):
        artifacts.keep(artifact)
    assert len(os.listdir(folder)) == 3
    assert saved.find_in(artifacts) is not None


def test_without_a_folder_nothing_is_kept(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Artifacts().keep(saved.artifact)
    assert os.listdir(tmp_path) == []


def test_a_damaged_file_in_a_folder_is_replaced(saved, folder):
    artifacts = Artifacts(folder=folder)
    artifacts.keep(saved.artifact)
    [path] = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(dc.DispatchCompileWarning, match=f"{path.name} is damaged.*compiled again"):
        assert saved.find_in(artifacts) is None
    artifacts.keep(saved.artifact)
    assert saved.find_in(artifacts) is not None


def test_a_folder_that_cannot_be_written(saved, folder):
    (folder / "in the way").write_text("no folder")
    with pytest.warns(dc.DispatchCompileWarning, match="silu_and_mul cannot be saved in .*in the way"):
        Artifacts(folder=folder / "in the way").keep(saved.artifact)


def test_the_environment_names_a_folder(monkeypatch):
    monkeypatch.delenv("DISPATCH_COMPILE_CACHE_DIR", raising=False)
    assert folder_from_environment() is None
    monkeypatch.setenv("DISPATCH_COMPILE_CACHE_DIR", "")
    assert folder_from_environment() is None
    monkeypatch.setenv("DISPATCH_COMPILE_CACHE_DIR", "/some/where")
    assert folder_from_environment() == Path("/some/where")


def test_threads_that_load_at_once(saved):
    artifacts, results = Artifacts([saved.artifact]), []

    def load() -> None:
        code = saved.find_in(artifacts)
        results.append(torch.equal(run(code, saved.arguments), saved.result))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8


def test_artifacts_hold_nothing_of_the_implementation(saved):
    """A cache is keyed weakly by it."""

    def reachable(value: Any) -> set[type]:
        if isinstance(value, dict):
            return {kind for item in (*value.keys(), *value.values()) for kind in reachable(item)}
        if isinstance(value, (tuple, list)):
            return {kind for item in value for kind in reachable(item)}
        return {type(value)} | (reachable(vars(value)) if hasattr(value, "__dict__") else set())

    plain = {str, bytes, int, type(None), Artifact, Program, type(saved.origin), types.MappingProxyType}
    assert reachable(saved.artifact) <= plain


# ---- On a GPU


@pytest.mark.cuda
def test_triton_kernels_in_another_process(folder):
    program = """if True:
        import sys
        import torch
        import dispatch_compile as dc
        from dispatch_compile._saved.artifacts import Artifact, Artifacts, read, write
        from dispatch_compile._saved.origin import origin_of
        from dispatch_compile._compile.specialization import Specialization
        from dispatch_compile._specialize.arguments import Parameters, flatten
        from dispatch_compile._specialize.key import key_of
        task, path = sys.argv[1:]
        op, config = dc.ops.rms_norm, dc.CompileConfig()
        torch.manual_seed(0)
        x = torch.randn(9, 4096, device="cuda", dtype=torch.bfloat16)
        misaligned = torch.randn(9 * 4096 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(9, 4096)
        weight = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
        def arguments_of(x):
            return flatten(Parameters.of(op.torch_op, op.activations), (x, weight, 1e-5), {})
        arguments = arguments_of(x)
        origin, key = origin_of(op.torch_op._schema.name, op.impls["native"], config), key_of(arguments)
        if task == "save":
            mode = dc.DispatchCompileMode(config=config)
            with mode:
                op(x, weight, 1e-5)
            [entry] = mode.cache.table(op, op.impls["native"], config).guarded
            code = entry.known.code
            write(path, [Artifact.of(origin, key, code)])
        else:
            code = Artifacts(read(path)).find(origin, key, arguments)
        for inputs in (x, x[:2], x.repeat(999, 1), misaligned):
            arguments = arguments_of(inputs)
            call = Specialization.of(code, arguments, origin).guarded_call(arguments, of_function=False)
            print(call((inputs, weight, 1e-5), {}).float().sum(dim=0)[:64].tolist())
        if task == "load":
            assert not {"torch._inductor", "torch._dynamo", "triton"} & set(sys.modules)
    """
    said = [
        subprocess.run(
            [sys.executable, "-c", program, task, str(folder / "file")], capture_output=True, text=True, check=True
        ).stdout
        for task in ("save", "load")
    ]
    assert said[0] == said[1]
    assert len(said[0].splitlines()) == 4
    [artifact] = read(folder / "file")
    assert artifact.program.triton
    assert {"triton", "cuda:0"} <= artifact.environment.keys()
    assert artifact.program.realigned
