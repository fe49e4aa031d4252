"""The ``passthrough`` command: what it measures, in which modes, what it writes, and what it says of bad arguments."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import passthrough_results as results
from benchmarks import proof, timing
from benchmarks.__main__ import main
from benchmarks.passthrough_calls import NO_MODE, PLAIN, Comparison, LookUpMode, PlainMode, comparisons
from benchmarks.passthrough_results import Quartiles, Results, Row
from benchmarks.peers import OURS, Peer
from dispatch_compile._mode import current_mode
from dispatch_compile.demo import ir_ops, moe

pytestmark = pytest.mark.run_once

NOT_CAUGHT, BODIES, ENTERING, CAUGHT = TITLES = (
    "An op that is not caught",
    "The body of a fused MoE, its IR ops taken out",
    "A mode itself",
    "A call that is caught, and the same code run by a plain mode",
)
CALLS = {
    NOT_CAUGHT: ["add", "view", "mm", "index", "empty", "cat", "copy_", "a custom op"],
    BODIES: ["1 token", "8 tokens", "64 tokens"],
    ENTERING: ["enter and leave"],
    CAUGHT: ["rms_norm", "silu_and_mul"],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a short run of the command wrote."""
    path = tmp_path_factory.mktemp("passthrough") / "results.json"
    threads = torch.get_num_threads()
    assert main(["passthrough", "--device", "cpu", "--rounds", "3", "--json", str(path)]) == 0
    torch.set_num_threads(threads)
    return path


@pytest.fixture(scope="module")
def compared() -> Iterator[dict[str, Comparison]]:
    with torch.inference_mode(), comparisons("cpu") as found:
        yield {comparison.title: comparison for comparison in found}


# ---- What is written


def test_json_has_everything(written: Path) -> None:
    data = json.loads(written.read_text())
    assert set(data) == {"schema", "machine", "device", "threads", "rounds", "tables"}
    assert data["schema"] == results.SCHEMA
    assert {"cpu", "torch", "python"} <= set(data["machine"])
    assert (data["device"], data["threads"], data["rounds"]) == ("cpu", 1, 3)
    assert {title: [row["call"] for row in rows] for title, rows in data["tables"].items()} == CALLS
    for title, rows in data["tables"].items():
        uncaught = title in (NOT_CAUGHT, BODIES)
        for row in rows:
            assert list(row["times"]) == ([NO_MODE, OURS, PLAIN] if uncaught else [OURS, PLAIN])
            assert min(row["times"].values()) > 0
            ratios = [f"{OURS} / {NO_MODE}", f"{PLAIN} / {NO_MODE}"] if uncaught else [f"{OURS} / {PLAIN}"]
            assert list(row["ratios"]) == ratios
            for ratio in row["ratios"].values():
                assert 0 < ratio["lower"] <= ratio["median"] <= ratio["upper"]


def test_reading_gives_what_was_written(written: Path) -> None:
    assert results.read(written).to_json() == written.read_text()


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    seconds = {"one": [1e-6, 6e-6, 3e-6], "other": [1e-6, 2e-6, 4e-6]}
    assert Row.of("call", seconds, [("one", "other")]) == Row(
        "call", {"one": 3.0, "other": 2.0}, {"one / other": Quartiles(0.875, 1.0, 2.0)}
    )


def test_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    row = Row("add", {NO_MODE: 0.512, PLAIN: 5.12}, {"plain mode / no mode": Quartiles(9.81, 10.0, 10.26)})
    near_one = Row("view", {NO_MODE: 0.4, PLAIN: 0.4}, {"plain mode / no mode": Quartiles(0.991, 1.0, 1.0204)})
    machine = {"cpu": "A CPU, 2 cores", "torch": "2.13.0", "python": "3.11.7"}
    path.write_text(Results(machine, "cpu", 1, 300, {"An op": [row, near_one]}).to_json())
    assert main(["passthrough", "--from-json", str(path)]) == 0
    assert (
        capsys.readouterr().out
        == """\
cpu     A CPU, 2 cores
torch   2.13.0
python  3.11.7
run     300 rounds, 1 thread; microseconds per call; ratios with their quartiles over the rounds

An op
      no mode  plain mode    plain mode / no mode
add      0.51        5.12      10.0 (9.8 to 10.3)
view     0.40        0.40  1.000 (0.991 to 1.020)
"""
    )
    assert main(["passthrough", "--from-json", str(path), "--markdown"]) == 0
    assert (
        capsys.readouterr().out
        == """\
A CPU, 1 thread, torch 2.13.0, python 3.11.7, 300 rounds. Microseconds per call; ratios with their quartiles over the rounds.

An op:

|  | no mode | plain mode | plain mode / no mode |
| --- | ---: | ---: | ---: |
| add | 0.51 | 5.12 | 10.0 (9.8 to 10.3) |
| view | 0.40 | 0.40 | 1.000 (0.991 to 1.020) |
"""  # noqa: E501
    )


@pytest.mark.parametrize("options", [[], ["--markdown"]])
def test_each_call_has_a_line(written: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passthrough", "--from-json", str(written), *options]) == 0
    lines = [line.lstrip("| ") for line in capsys.readouterr().out.splitlines()]
    for title, calls in CALLS.items():
        assert sum(line.rstrip(":") == title for line in lines) == 1
        for call in calls:
            assert sum(line.startswith(f"{call} ") for line in lines) == 1, call


# ---- What is measured


class Counting(TorchDispatchMode):
    """Counts the ops that a dispatch mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def seen_in(peer: Peer) -> list[str]:
    counting = Counting()
    with counting:
        peer.call(*peer.arguments(1)[0])
    return counting.seen


def test_each_call_is_the_op_that_it_is_called(compared: dict[str, Comparison]) -> None:
    seen = {call: seen_in(peers[0]) for call, peers in compared[NOT_CAUGHT].peers.items()}
    assert seen == {
        "add": ["aten::add.Tensor"],
        "view": ["aten::view"],
        "mm": ["aten::mm"],
        "index": ["aten::index.Tensor"],
        "empty": ["aten::empty.memory_format"],
        "cat": ["aten::cat"],
        "copy_": ["aten::copy_"],
        "a custom op": ["dispatch_compile_passthrough::twice"],
    }


@pytest.mark.parametrize(("call", "tokens"), [("1 token", 1), ("8 tokens", 8), ("64 tokens", 64)])
def test_the_body_has_no_ir_ops_and_many_others(compared: dict[str, Comparison], call: str, tokens: int) -> None:
    no_mode, ours, plain = compared[BODIES].peers[call]
    assert no_mode.call is ours.call is plain.call is moe.fused_moe
    assert len(no_mode.arguments(1)[0][0]) == tokens
    seen = seen_in(no_mode)
    assert len(seen) > 40
    assert all(name.startswith("aten::") for name in seen)


@pytest.mark.parametrize("title", [NOT_CAUGHT, BODIES])
def test_each_way_is_in_its_mode(compared: dict[str, Comparison], title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handed_on: list[str] = []
    plain_dispatch = PlainMode.__torch_dispatch__

    def recording(self, func, types, args=(), kwargs=None):
        handed_on.append(func.name())
        return plain_dispatch(self, func, types, args, kwargs)

    monkeypatch.setattr(PlainMode, "__torch_dispatch__", recording)
    for peers in compared[title].peers.values():
        active = {}
        for peer in peers:
            handed_on.clear()
            with peer.context:
                active[peer.name] = current_mode()
                peer.call(*peer.arguments(1)[0])
            assert bool(handed_on) == (peer.name == PLAIN)
        assert active == {NO_MODE: None, OURS: peers[1].context, PLAIN: None}


def test_both_ways_of_a_caught_call_run_the_same_code(compared: dict[str, Comparison]) -> None:
    for peers in compared[CAUGHT].peers.values():
        ours, plain = peers
        counts = ours.context.cache.stats()
        results_of = []
        for peer in (ours, plain):
            with peer.context:
                results_of.append(peer.call(*peer.arguments(1)[0]))
        after = ours.context.cache.stats()
        assert (after.compiles, after.hits) == (counts.compiles, counts.hits + 1)
        assert torch.equal(*results_of)
        proof.check_compiled(plain)


def test_a_plain_mode_that_finds_no_code_is_found_out(compared: dict[str, Comparison]) -> None:
    for _, plain in compared[CAUGHT].peers.values():
        with torch.inference_mode(), pytest.raises(proof.Broken, match="it ran eagerly"):
            proof.check_compiled(replace(plain, context=LookUpMode({})))


def test_ops_without_ir_ops_give_results_of_the_same_shapes() -> None:
    own, aten = ir_ops.ir_ops(ir_ops.OWN), ir_ops.ir_ops(ir_ops.ATEN)
    x, weight = torch.randn(3, 8), torch.randn(8)

    def described(source: ir_ops.IrOps) -> list[tuple[torch.Size, torch.dtype]]:
        found = source.rms_norm(x, weight, 1e-6), source.activation_and_mul(x), *source.quant_per_token(x)
        return [(each.shape, each.dtype) for each in found]

    assert described(aten) == described(own)


@pytest.mark.parametrize("calls", [1, 7])
def test_all_ways_make_as_many_calls(calls: int) -> None:
    made = {"one": 0, "other": 0}

    def make(name: str) -> None:
        made[name] += 1

    timer = timing.HostTimer("cpu", calls)
    samples = timing.measure([Peer(name, make, [(name,)]) for name in made], timer, 5, each_round=lambda: None)
    assert {name: len(kinds[timing.HOST]) for name, kinds in samples.items()} == {"one": 5, "other": 5}
    assert made == dict.fromkeys(made, 5 * (calls + 1))  # one in each round is not timed


# ---- Bad arguments


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(["passthrough", *arguments])
    assert exit_info.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1].partition("error: ")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "argument --rounds: '0' is not a whole number from 1 up"),
        (["--rounds", "x"], "argument --rounds: 'x' is not a whole number from 1 up"),
        (["--rounds", "1"], "argument --rounds: quartiles need 2 rounds or more"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["add"], "unrecognized arguments: add"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, *arguments).startswith(message)


def test_no_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal(capsys, "--device", "cuda") == "--device cuda: torch finds no CUDA device"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "is no JSON file"),
        ('{"schema": 1}', "holds no results of this benchmark"),
        ('{"schema": "passthrough 1"}', "is not complete"),
    ],
)
def test_bad_results(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert message in refusal(capsys, "--from-json", str(path))


def test_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in refusal(capsys, "--from-json", str(tmp_path / "missing.json"))
