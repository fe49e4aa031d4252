"""The ``vllm-bodies`` command: real vLLM layers in opaque ops, what is proven of each variant, and what is written."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.progress import Progress
from benchmarks.proof import Broken
from benchmarks.results import BadResults, Times
from benchmarks.vllm_bodies import report, results
from benchmarks.vllm_bodies.results import (
    BODIES,
    EAGER,
    GRAPH,
    OURS,
    REST,
    TODAY,
    VARIANTS,
    CaseResult,
    Results,
    Settings,
    Sizes,
    VariantResult,
)
from benchmarks.vllm_bodies.run import run
from benchmarks.vllm_bodies.worker import LARGEST_DIFFERENCE, Worker

pytestmark = pytest.mark.long

has_vllm = importlib.util.find_spec("vllm") is not None
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")

MOE, MLA = "fused_moe_per_group", "mla_decode_with_norms"
TOKENS = (2, 3)
SIZES = Sizes(hidden=256, intermediate=128, heads=2)


# ---- What is measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a short run of the command wrote."""
    import vllm_support  # noqa: F401 - has vLLM find a platform, in the processes that the command starts as well

    path = tmp_path_factory.mktemp("vllm_bodies") / "results.json"
    sizes = ["--hidden", str(SIZES.hidden), "--intermediate", str(SIZES.intermediate), "--heads", str(SIZES.heads)]
    what = ["--device", "cpu", "--bodies", f"{MOE},{MLA}", "--tokens", ",".join(map(str, TOKENS)), "--rounds", "2"]
    assert main(["vllm-bodies", *what, *sizes, "--json", str(path)]) == 0
    return results.read(path)


@pytest.mark.vllm
def test_every_variant_is_measured(measured: Results) -> None:
    assert [(case.body, case.tokens) for case in measured.cases] == [(body, n) for body in (MOE, MLA) for n in TOKENS]
    for case in measured.cases:
        assert tuple(case.variants) == VARIANTS
        for name, found in case.variants.items():
            assert found.error is None, name
            assert set(found.times) == {"host"}
            assert len(found.times["host"].rounds) == 2
            assert found.first_call > 0


@pytest.mark.vllm
def test_results_are_those_of_the_eager_body(measured: Results) -> None:
    for case in measured.cases:
        assert case.variants[EAGER].difference == case.variants[REST].difference == 0
        for name in (TODAY, OURS):
            assert 0 <= case.variants[name].difference <= LARGEST_DIFFERENCE


@pytest.mark.vllm
def test_small_ops_run_compiled(measured: Results) -> None:
    """A call sends no other ATen ops through the dispatcher than the body without its small ops; vLLM today leaves the
    norms to be run op by op."""
    for case in measured.cases:
        ops = {name: found.aten_ops for name, found in case.variants.items()}
        assert ops[OURS] == ops[REST] < ops[EAGER]
        assert (ops[TODAY] == ops[REST]) == (case.body == MOE)


@pytest.mark.vllm
def test_compilations(measured: Results) -> None:
    """Ours needs one for each op and width, whatever the number of tokens; what vLLM's need is Dynamo's decision."""
    assert {body: counts[OURS] for body, counts in measured.compilations.items()} == {MOE: 3, MLA: 4}
    assert all(set(counts) == {TODAY, OURS} and counts[TODAY] >= 2 for counts in measured.compilations.values())


# ---- Proof


@pytest.fixture
def eager_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("vllm_support")
    from vllm.ir.op import IrOp

    for op in IrOp.registry.values():
        monkeypatch.setattr(op, "_priority_impls", op._priority_impls)
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    with torch.inference_mode():
        worker = Worker(EAGER, SIZES, "cpu")
        worker.begin(MOE, tmp_path / "cache")
        yield worker


@pytest.mark.vllm
def test_a_variant_that_runs_eagerly_is_found_out(eager_worker: Worker, tmp_path: Path) -> None:
    from benchmarks.vllm_bodies.variants import Today

    eager_worker._variant.never_eager = Today.never_eager
    with pytest.raises(Broken, match="small ops ran eagerly: aten::clamp, aten::silu"):
        eager_worker.prepare(2, tmp_path / "expected.pt")


@pytest.mark.vllm
def test_a_variant_with_other_results_is_found_out(eager_worker: Worker, tmp_path: Path) -> None:
    expected = tmp_path / "expected.pt"
    eager_worker.prepare(2, expected)
    eager_worker._name = OURS
    assert eager_worker.prepare(2, expected).difference == 0
    first, *others = torch.load(expected)
    torch.save([first * 1.1, *others], expected)
    with pytest.raises(Broken, match="the results differ from the eager ones by"):
        eager_worker.prepare(2, expected)


@pytest.mark.skipif(has_vllm, reason="fails where there is no vLLM")
def test_what_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "none")
    [found] = run(Settings("cpu", (MOE,), (2,), SIZES, 1, 1), Progress())
    [case] = found.cases
    assert {name: one.error for name, one in case.variants.items()} == dict.fromkeys(
        VARIANTS, "ModuleNotFoundError: No module named 'vllm'"
    )
    assert found.compilations == {MOE: {}}
    assert "not measured\n" in report.text(found)


# ---- What is written


def case(body: str, tokens: int, eager: float, today: float, ours: float, rest: float) -> CaseResult:
    microseconds = dict(zip(VARIANTS, (eager, today, ours, rest), strict=True))
    return CaseResult(
        body,
        tokens,
        {
            name: VariantResult({kind: Times(time, (time,)) for kind in ("host", "device", GRAPH)}, 0.5, 12)
            for name, time in microseconds.items()
        },
    )


@pytest.fixture
def found() -> Results:
    """Made up, as from a GPU."""
    return Results(
        {"cpu": "a CPU, 8 cores", "gpu": "a GPU", "cuda": "13.0", "torch": "2.11.0", "vllm": "0.23.0"},
        Settings("cuda", (MOE, MLA), (1, 64), SIZES, 1, 1),
        (case(MOE, 1, 80, 60, 35, 10), case(MOE, 64, 80, 60, 45, 30), case(MLA, 1, 80, 60, 20, 10)),
        {MOE: {TODAY: 2, OURS: 3}, MLA: {TODAY: 2, OURS: 4}},
    )


@pytest.fixture
def written(found: Results, tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    path.write_text(found.to_json())
    return path


def test_reading_gives_what_was_written(found: Results, written: Path) -> None:
    assert results.read(written) == found


def test_json_has_everything(written: Path) -> None:
    data = json.loads(written.read_text())
    assert set(data) == {"schema", "machine", "settings", "cases", "compilations"}
    assert data["schema"] == results.SCHEMA
    assert data["settings"]["sizes"] == {"hidden": 256, "intermediate": 128, "heads": 2}
    for each in data["cases"]:
        for one in each["variants"].values():
            assert set(one) == {"times", "first_call", "aten_ops", "difference", "error"}


def test_tables(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm-bodies", "--from-json", str(written)]) == 0
    text = capsys.readouterr().out
    assert "Host time per call, to issue it, µs\nbody " in text
    assert "Device time of a replayed CUDA graph, µs\nbody " in text
    [row, *_] = (line.split() for line in text.splitlines() if line.startswith(f"{MOE} "))
    assert row[2:] == ["80.0", "60.0", "35.0", "10.0", "0.44", "0.58", "0.50"]  # 35 / 80, 35 / 60, 25 / 50
    assert f"{MOE}{2:>41}" not in text
    assert ["2", "3", "1.0", "1.0"] in [line.split()[1:] for line in text.splitlines() if line.startswith(MOE)]


def test_markdown_of_a_part(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm-bodies", "--from-json", str(written), "--markdown", "--bodies", MOE, "--tokens", "64"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("a GPU, vLLM 0.23.0, torch 2.11.0, cuda 13.0. Hidden size 256")
    assert f"| {MOE} | 64 | 80.0 | 60.0 | 45.0 | 30.0 | 0.56 | 0.75 | 0.50 |" in text
    assert MLA not in text
    assert "| 1 |" not in text
    assert "Compilations for 2 token counts" in text
    assert f"| {MOE} | 2 | 3 | 1.0 | 1.0 |" in text, "the first calls at all numbers of tokens"


def test_an_unmeasured_variant_is_left_blank(found: Results) -> None:
    broken = {**found.cases[0].variants, TODAY: VariantResult(error="Broken: it ran eagerly")}
    text = report.text(replace(found, cases=(replace(found.cases[0], variants=broken),)))
    [row, *_] = (line.split() for line in text.splitlines() if line.startswith(f"{MOE} "))
    assert row[2:] == ["80.0", "-", "35.0", "10.0", "0.44", "-", "-"]
    assert f"not measured\n{MOE}: {TODAY}: Broken: it ran eagerly (1 tokens)" in text


@needs_matplotlib
def test_plot(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.png"
    assert main(["vllm-bodies", "--from-json", str(written), "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


# ---- What is refused


def test_a_part_that_is_not_there(found: Results) -> None:
    with pytest.raises(BadResults, match="these results have nothing on"):
        found.only(("mla_decode",))


def test_unknown_body(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["vllm-bodies", "--bodies", "mla"])
    assert f"there is no body 'mla'; there are {', '.join(BODIES)}" in capsys.readouterr().err


@pytest.mark.skipif(has_vllm, reason="fails where there is no vLLM")
def test_without_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["vllm-bodies", "--device", "cpu"])
    assert "it needs vLLM, which is not installed" in capsys.readouterr().err


@pytest.mark.vllm
def test_every_body_has_a_name() -> None:
    pytest.importorskip("vllm_support")
    from benchmarks.vllm_bodies import bodies, variants

    assert tuple(bodies.BODIES) == BODIES
    assert tuple(variants.VARIANT_CLASSES) == VARIANTS
