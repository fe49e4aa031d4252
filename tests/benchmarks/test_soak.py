"""The ``soak`` command: what it reports, and that it finds what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import soak_results
from benchmarks.__main__ import main
from benchmarks.soak_calls import activities
from benchmarks.soak_results import Memory, Results

pytestmark = pytest.mark.run_once


@pytest.fixture(autouse=True)
def number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def soak(path: Path, backend: str) -> tuple[int, dict[str, Any]]:
    """The exit status of a short run, and the report."""
    arguments = ["--device", "cpu", "--backend", backend, "--threads", "3", "--seconds", "3", "--json", str(path)]
    return main(["soak", *arguments]), json.loads(path.read_text())


def test_report(tmp_path, capsys):
    status, report = soak(tmp_path / "soak.json", "eager")
    assert (status, report["problems"], report["errors"]) == (0, [], {})
    assert report["schema"] == soak_results.SCHEMA
    assert (report["device"], report["backend"], report["threads"]) == ("cpu", "eager", 3)
    assert set(report["calls"]) <= set(activities("cpu"))
    # Caught calls are compiled, native or passed; those in bodies come on top, those in children do not count.
    made = sum(report["calls"].values())
    assert report["hits"] > made / 2
    assert 0 < report["checked"] < made
    for when in ("start", "end"):
        assert report[when]["objects"] > 0
        assert report[when]["resident_mib"] is None or report[when]["resident_mib"] > 0
        assert report[when]["device_mib"] is None
    shown = capsys.readouterr().out
    assert "Nothing was wrong." in shown
    assert f"{made:,}" in shown


def wrong(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., list[Tensor]]:
    """A backend whose code is off by a half of the first result."""

    def run(*args: Any) -> list[Tensor]:
        first, *others = graph(*args)
        return [(first.to(torch.float32) * 1.5).to(first.dtype), *others]

    return run


def test_wrong_code_is_found(tmp_path, capsys):
    torch._dynamo.register_backend(wrong, name="dispatch_compile_wrong")
    status, report = soak(tmp_path / "soak.json", "dispatch_compile_wrong")
    assert status == 1
    assert any(text.startswith("plain: Broken: result 0 differs from eager") for text in report["errors"])
    assert "Wrong:" in capsys.readouterr().out


def test_a_backend_that_there_is_not(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["soak", "--device", "cpu", "--backend", "indctor"])
    assert exit_.value.code == 2
    assert "unknown backend 'indctor'" in capsys.readouterr().err


FINE = Results(
    machine={"cpu": "one"},
    device="cpu",
    backend="eager",
    threads=1,
    seconds=1.0,
    calls={"plain": 100},
    checked=5,
    compiles=10,
    hits=100,
    fallbacks=0,
    asides=0,
    reasons={},
    errors={},
    start=Memory(100.0, 1000, None),
    end=Memory(101.0, 1010, None),
    grown={},
)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"errors": {"plain: KeyError: 1": 3}}, "3 times: plain: KeyError: 1"),
        ({"hits": 0}, "no call ran compiled"),
        ({"end": Memory(500.0, 1000, None)}, "resident MiB grew from 100 to 500, by more than 192"),
        ({"end": Memory(100.0, 100_000, None)}, "objects grew from 1,000 to 100,000, by more than 40,400"),
        ({"end": Memory(None, 1000, None)}, None),
        (
            {"start": Memory(100.0, 1000, 50.0), "end": Memory(100.0, 1000, 70.0)},
            "MiB on the GPU grew from 50 to 70, by more than 16",
        ),
    ],
)
def test_what_is_a_problem(change, problem):
    results = replace(FINE, **change)
    assert list(results.problems()) == ([] if problem is None else [problem])
    assert ("Nothing was wrong." in soak_results.text(results)) is (problem is None)
