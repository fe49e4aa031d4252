"""The rooms of the package stand in the order of the data: what is imported lies below, and nothing in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from expecttest import assert_expected_inline

import dispatch_compile

PACKAGE = Path(dispatch_compile.__file__).parent
ROOMS = (
    *("_torch", "_basics", "_dispatch", "_ir", "_specialize", "_numerics"),
    *("_compile", "_saved", "_trace", "_cache", "_call"),
)


def modules() -> dict[str, Path]:
    """The package's modules by their dotted names inside it; the package itself is ``""``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, wherever it does so, but for those of its annotations alone."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            module = ".".join(part for part in base if part)
            found |= {
                full if (full := f"{module}.{alias.name}".lstrip(".")) in MODULES else module for alias in node.names
            }
    return found - {name}


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from statements(child)


def test_every_private_room_is_in_the_order():
    assert {path.parent.name for path in MODULES.values() if path.parent.name.startswith("_")} == set(ROOMS)


@pytest.mark.parametrize("name", [name for name in MODULES if name.partition(".")[0] in ROOMS])
def test_a_room_imports_only_what_lies_below(name):
    room = ROOMS.index(name.partition(".")[0])
    above = {other for other in imports(name) if other.partition(".")[0] not in ROOMS[: room + 1]}
    assert above == set()


def test_there_is_no_circle():
    left = {name: imports(name) for name in MODULES}
    while free := [name for name, needed in left.items() if not needed & set(left)]:
        for name in free:
            del left[name]
    assert left == {}


def test_what_a_wheel_has(tmp_path):
    """Built from the files that git knows: a build leaves others in the folder that it is made in."""
    root = PACKAGE.parent
    names = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout
    source = tmp_path / "source"
    for name in names.splitlines():
        if (root / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((root / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    [wheel] = tmp_path.glob("*.whl")
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True, check=True
    ).stdout
    files = [Path(line.split()[0]) for line in listed.splitlines()[1:]]
    folders: dict[str, list[str]] = {}
    for file in sorted(file for file in files if file.parent.suffix != ".dist-info" and file.parent.name != "licenses"):
        folders.setdefault(str(file.parent), []).append(file.name.removesuffix(".py"))
    lines = (f"{folder}: {' '.join(names)}" for folder, names in folders.items())
    text = "\n".join(textwrap.fill(line, 110, subsequent_indent="  ") for line in lines)
    assert_expected_inline(
        text,
        """\
dispatch_compile: __init__ __main__ _body _enable _mode _native _version _warmup py.typed testing
dispatch_compile/_basics: __init__ checks errors fork nodes summary
dispatch_compile/_cache: __init__ background cache counters making orders retry table
dispatch_compile/_call: __init__ decision explain kernel profiler route
dispatch_compile/_compile: __init__ capture compilation config failure inlining layouts numbers options
  outcome predicates program reading reference results specialization surroundings
dispatch_compile/_dispatch: __init__ active hooks opaque
dispatch_compile/_ir: __init__ embedded protocol references registry selection
dispatch_compile/_numerics: __init__ arithmetic bitwise decompositions
dispatch_compile/_saved: __init__ artifacts container origin slicing
dispatch_compile/_specialize: __init__ arguments aside callee change difference guards key memory stand_ins
dispatch_compile/_torch: __init__ capture dispatch inductor saved_code
dispatch_compile/_trace: __init__ environment event files perfetto table trace
dispatch_compile/demo: __init__ cli ir_ops mla moe run workload
dispatch_compile/ops: __init__ activation fused layernorm quantization
dispatch_compile/trace_script: __init__ cli late_ops script
dispatch_compile/vllm: __init__ _configuration _custom_ops _forward_op _ir_ops _native _process _required
  _results _settings""",
    )
