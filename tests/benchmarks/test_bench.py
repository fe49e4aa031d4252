"""The benchmark's command: what it writes, that peers prove what they claim, and what it says of bad arguments."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import compile_time, peers, plot, proof, results, timing
from benchmarks.__main__ import main
from benchmarks.cases import CASES, Inputs, Sizes
from benchmarks.measure import run
from benchmarks.progress import Progress
from benchmarks.results import Settings

pytestmark = pytest.mark.run_once

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")

TINY = ("ops", "--device", "cpu", "--hidden", "512", "--no-compile-times")
PEERS = {
    peers.EAGER,
    peers.TORCH_COMPILE,
    peers.MARK_DYNAMIC,
    peers.F_RMS_NORM,
    peers.OURS,
    peers.CODE_ALONE,
    peers.COPY,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a short run of the command wrote."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ROUNDS", 2)
        patch.setattr(timing, "CPU_BATCH_SECONDS", 0.0)
        assert main([*TINY, "--ops", "rms_norm", "--tokens", "1,4", "--json", str(path)]) == 0
    torch.set_num_threads(threads)
    return path


def test_json_has_everything(written):
    data = json.loads(written.read_text())
    assert set(data) == {"schema", "machine", "settings", "cases", "compilations", "compile_times"}
    assert data["schema"] == results.SCHEMA
    assert {"cpu", "torch", "python"} <= set(data["machine"])
    assert data["settings"] == {
        "device": "cpu",
        "ops": ["rms_norm"],
        "tokens": [1, 4],
        "hidden": 512,
        "dtype": "bf16",
        "threads": 1,
        "compile_times": False,
    }
    assert [(case["op"], case["tokens"]) for case in data["cases"]] == [("rms_norm", 1), ("rms_norm", 4)]
    for case in data["cases"]:
        assert case["bytes_moved"] == 2 * 512 * (2 * case["tokens"] + 1)
        assert set(case["peers"]) == PEERS
        for name, peer in case["peers"].items():
            assert peer["error"] is None, name
            assert set(peer["times"]) == {"host"}
            assert len(peer["times"]["host"]["rounds"]) == 2
            assert min(peer["times"]["host"]["rounds"]) <= peer["times"]["host"]["median"]
            assert peer["times"]["host"]["median"] > 0
    # One token, and any other number.
    assert data["compilations"] == {
        "rms_norm": {peers.TORCH_COMPILE: 2, peers.MARK_DYNAMIC: 2, peers.OURS: 2},
    }


def test_reading_gives_what_was_written(written):
    assert results.read(written).to_json() == written.read_text()


def test_tables(written, capsys):
    assert main(["ops", "--from-json", str(written)]) == 0
    text = capsys.readouterr().out
    assert "rms_norm: time per call, µs\ntokens " in text
    assert "\nours / torch.compile in a mode  " in text
    assert "\nours / limit " in text


def test_markdown_of_a_part(written, capsys):
    assert main(["ops", "--from-json", str(written), "--markdown", "--tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [header, alignment, row] = (line for line in lines if line.startswith("|"))
    assert header.startswith("| op | tokens | eager | torch.compile in a mode |")
    assert alignment.count("|") == header.count("|") == row.count("|")
    assert row.startswith("| rms_norm | 4 |")


@needs_matplotlib
def test_plot(written, tmp_path):
    path = tmp_path / "results.png"
    assert main(["ops", "--from-json", str(written), "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@needs_matplotlib
def test_every_peer_has_a_style():
    names = {value for name, value in vars(peers).items() if name.isupper() and isinstance(value, str)}
    assert set(plot.STYLES) == names


def test_every_op_of_the_package_is_a_case():
    import dispatch_compile as dc

    assert list(CASES) == sorted(dc.ops.__all__, key=list(CASES).index)


# ---- Proof


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()  # what it has once run eagerly, it runs eagerly ever after
    yield
    torch._dynamo.reset()


class PlainMode(TorchDispatchMode):
    """While such a mode is on the stack, compiled functions silently run eagerly."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def rotation(tokens: int = 4):
    return [CASES["silu_and_mul"].arguments(Inputs(Sizes(tokens, 64, torch.bfloat16, "cpu")))]


def test_a_compiled_function_that_runs_eagerly_is_found_out():
    case = CASES["silu_and_mul"]
    with torch.inference_mode(), PlainMode():
        peer = peers.TorchCompileInMode("naive", case.op, peers.all_sizes_dynamic(case)).peer(rotation())
        with pytest.raises(proof.Broken, match=r"it ran eagerly: .*aten::mul, .*aten::silu"):
            proof.check_compiled(peer)


@pytest.mark.parametrize("name", [peers.TORCH_COMPILE, peers.MARK_DYNAMIC, peers.OURS, peers.CODE_ALONE])
def test_compiled_peers_run_compiled_code(name):
    case = CASES["silu_and_mul"]
    with torch.inference_mode():
        [way] = (way for way in peers.contenders(case, case.op, "cpu", with_vllm=False) if way.name == name)
        for tokens in (1, 4, 16):
            peer = way.peer(rotation(tokens))
            with peer.context:
                result = peer.call(*peer.arguments(1)[0])
            proof.check_result(result, case.op(*rotation(tokens)[0]))
            assert peer.compiled
            proof.check_compiled(peer)


def test_wrong_results_are_found_out():
    expected = torch.ones(4, 4, dtype=torch.bfloat16)
    proof.check_result(expected * 1.005, expected)
    with pytest.raises(proof.Broken, match="result 0 differs from eager"):
        proof.check_result(expected * 1.5, expected)
    with pytest.raises(proof.Broken, match="result 0 is"):
        proof.check_result(expected[:2], expected)


def test_a_peer_that_fails_is_reported_and_the_others_are_measured(monkeypatch, capsys):
    def fails(*args: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "CPU_BATCH_SECONDS", 0.0)
    monkeypatch.setattr(
        "benchmarks.measure.contenders",
        lambda case, eager, device, with_vllm: [peers.Calling("eager", eager), peers.Calling("broken", fails)],
    )
    found = run(Settings("cpu", ("silu_and_mul",), (4,), 64, "bf16", 1, False), False, Progress())
    [case] = found.cases
    assert case.time("eager", timing.HOST) > 0
    assert case.peers["broken"].error == "RuntimeError: no such kernel"
    assert "broken: RuntimeError: no such kernel" in capsys.readouterr().err


def test_first_calls_are_timed():
    settings = Settings("cpu", ("silu_and_mul",), (4,), 64, "bf16", 1, True)
    for peer in compile_time.PEERS:
        seconds = compile_time.first_calls(peer, settings)
        assert list(seconds) == ["silu_and_mul"]
        assert seconds["silu_and_mul"] > 0


# ---- Bad arguments


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(["ops", *arguments])
    assert exit_info.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1].partition("error: ")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "rmsnorm"], "argument --ops: there is no op 'rmsnorm'; did you mean rms_norm?"),
        (["--tokens", "1,x"], "argument --tokens: '1,x' is not a list of whole numbers from 1 up, like 1,8,64"),
        (["--tokens", "0"], "argument --tokens: '0' is not a list of whole numbers from 1 up, like 1,8,64"),
        (["--hidden", "-4"], "argument --hidden: '-4' is not a whole number from 1 up"),
        (
            ["--device", "cpu", "--hidden", "100", "--ops", "quant_fp8_per_group"],
            "--hidden 100: quant_fp8_per_group needs a multiple of 128",
        ),
        (["--device", "cpu", "--vllm-kernels", "k.so"], "--vllm-kernels: they need --device cuda"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert refusal(capsys, *arguments) == message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda(capsys):
    assert refusal(capsys, "--device", "cuda") == "--device cuda: torch finds no CUDA device"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "is no JSON file"),
        ("{}", "holds no results of this benchmark"),
        ('{"schema": 1}', "is not complete"),
    ],
)
def test_bad_results(content, message, tmp_path, capsys):
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert message in refusal(capsys, "--from-json", str(path))


def test_no_results(tmp_path, capsys):
    assert "No such file" in refusal(capsys, "--from-json", str(tmp_path / "missing.json"))


def test_part_that_is_not_there(written, capsys):
    assert "have nothing on" in refusal(capsys, "--from-json", str(written), "--tokens", "7")


def test_no_matplotlib(written, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal(capsys, "--from-json", str(written), "--plot", str(tmp_path / "x.png"))
    assert message == 'a plot needs matplotlib: pip install "dispatch-compile[bench]"'
