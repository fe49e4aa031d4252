"""The ``numerics --ops`` command: which ops it sweeps, what it writes, and what it shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import sweep, sweep_cases, sweep_results, sweep_values
from benchmarks.__main__ import main
from benchmarks.sweep_results import BITWISE, DEFAULT, Difference, Row, Summary, Sweep, faults_of

pytestmark = pytest.mark.run_once

EQUAL, ROUNDED = Difference(1000, 0, 0, {}, ""), Difference(1000, 10, 3, {}, "of 1 2 for 2.1")
WRONG = Difference(1000, 4, 9, {"NaN": 2, "ULPs": 2}, "of 1 nan for 2")
ROWS = [
    Row("expm1.default", "", "fp32", DEFAULT, EQUAL),
    Row("add.Tensor", "x, 0.1", "fp32", DEFAULT, ROUNDED),
    Row("fmod.Scalar", "1.7", "fp32", DEFAULT, WRONG),
    Row("fmod.Scalar", "1.7", "fp32", BITWISE, ROUNDED),
]


@pytest.fixture
def found(monkeypatch) -> Sweep:
    monkeypatch.setattr(
        sweep_results, "describe_machine", lambda device: {"cpu": "A CPU, 2 cores", "torch": "2.13.0", "python": "3.11"}
    )
    return Sweep.of("cpu", 3, 61.2, {"draws random numbers": 60}, ROWS)


def test_reading_gives_what_was_written(found, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(found.to_json())
    assert sweep_results.read(path) == found


def test_what_is_more_than_the_configuration_allows(found):
    assert found.summaries == (Summary(DEFAULT, "fp32", 3, 1, 1, 1), Summary(BITWISE, "fp32", 1, 0, 0, 1))
    assert found.more == tuple(ROWS[2:])


def test_tables(found):
    text = sweep_results.markdown(found)
    assert "| default | fp32 | 3 | 1 | 1 | 1 |" in text
    assert "| fmod.Scalar | 1.7 | fp32 | default | NaN, ULPs | of 1 nan for 2 |" in text
    assert "| fmod.Scalar | 1.7 | fp32 | bitwise | 0.01 of the elements, 3 ULPs | of 1 2 for 2.1 |" in text
    assert "60 draws random numbers" in text
    assert "fmod.Scalar" in sweep_results.text(found)


@pytest.mark.parametrize(
    ("actual", "expected", "faults"),
    [
        ([1.0, float("nan"), 0.0], [1.0, float("nan"), 0.0], {}),
        ([1.0], [1.0 + 4 * 2**-23], {}),
        ([1.0], [1.0 + 5 * 2**-23], {"ULPs": 1}),
        ([0.0], [-0.0], {"sign of zero": 1}),
        ([1.0], [float("nan")], {"NaN": 1}),
        ([torch.finfo(torch.float32).max], [float("inf")], {}),
        ([1e30], [float("inf")], {"infinity": 1}),
    ],
)
def test_what_is_more_than_rounding(actual, expected, faults):
    assert dict(faults_of(torch.tensor(actual), torch.tensor(expected))) == faults


def test_what_is_more_than_rounding_of_integers_and_sums():
    assert dict(faults_of(torch.tensor([1, 2]), torch.tensor([1, 3]))) == {"integer": 1}
    assert dict(faults_of(torch.tensor([1.0, 1e-6]), torch.tensor([1.0, 2e-6]), sums=True)) == {}
    assert dict(faults_of(torch.tensor([1.0, 1e-5]), torch.tensor([1.0, 2e-5]), sums=True)) == {"ULPs": 1}


def test_what_is_more_than_rounding_of_what_cancels():
    actual, expected = torch.tensor([1e-7, 1e-6]), torch.tensor([2e-7, 2e-6])
    assert dict(faults_of(actual, expected)) == {"ULPs": 2}
    assert dict(faults_of(actual, expected, cancelled=torch.tensor([1.0, 1.0]))) == {"ULPs": 1}
    assert dict(faults_of(actual, expected, cancelled=torch.tensor([1.0, 5.0]))) == {}
    # In 16 bits, too, it is computed in 32.
    assert dict(faults_of(actual.bfloat16(), expected.bfloat16(), cancelled=torch.ones(2))) == {"ULPs": 1}


def test_what_is_compared_on_a_gpu():
    """Not what eager itself computes otherwise from call to call: of sums, the bits; of places, anything."""
    calls = sweep_cases.variants(["index_add", "median", "exp"], "fp32")

    def names(config: str, device: str) -> set[str]:
        return {sweep_cases.name_of(call.op) for batch in sweep._batches(calls, config, device) for call in batch}

    assert names(DEFAULT, "cpu") == names(BITWISE, "cpu") == {"index_add", "median", "exp"}
    assert names(DEFAULT, "cuda") == {"index_add", "exp"}
    assert names(BITWISE, "cuda") == {"exp"}


def test_what_it_sweeps():
    ops = sweep_cases.swept_ops()
    assert len(ops) > 280
    assert {torch.ops.aten.floor_divide.default, torch.ops.aten._softmax.default} < set(ops)
    assert not {op for op in ops if op._schema.is_mutable}
    assert set(sweep_cases.RECIPES) >= sweep_cases.SUMS
    reasons = sweep_cases.left_out()
    assert len(ops) + sum(reasons.values()) == len(sweep_cases.inductors_ops())


@pytest.mark.parametrize("dtype", sweep_values.DTYPES)
def test_values_are_special(dtype):
    values = sweep_values.ones(sweep_values.DTYPES[dtype])
    if values.dtype.is_floating_point:
        info = torch.finfo(values.dtype)
        assert values.isnan().any()
        assert {info.max, -info.max, float("inf"), 0.0} <= set(values.tolist())
        assert {True, False} == set(values[values == 0].signbit().tolist())
        assert ((values != 0) & (values.abs() < info.smallest_normal)).any()
    elif values.dtype is not torch.bool:
        assert {torch.iinfo(values.dtype).max, torch.iinfo(values.dtype).min} <= set(values.tolist())


@pytest.fixture
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def test_it_sweeps(threads, tmp_path: Path, capsys):
    path = tmp_path / "results.json"
    arguments = ["--device", "cpu", "--ops", "expm1,sign", "--dtypes", "fp32,int32", "--json", str(path)]
    assert main(["numerics", *arguments]) == 0
    assert "Calls of 2 ops" in capsys.readouterr().out
    found = sweep_results.read(path)
    calls = {(summary.config, summary.dtype): summary.calls for summary in found.summaries}
    assert calls == {(config, dtype): 2 for config in (DEFAULT, BITWISE) for dtype in ("fp32", "int32")}
    assert not found.more
    assert main(["numerics", "--ops", "all", "--from-json", str(path), "--markdown"]) == 0


def test_bad_arguments(capsys):
    for arguments, message in (
        (["--ops", "expm2"], "no code of its own for expm2"),
        (["--dtypes", "fp8"], "fp8: not among"),
        (["--every", "0"], "not a whole number"),
    ):
        with pytest.raises(SystemExit):
            main(["numerics", *arguments])
        assert message in capsys.readouterr().err
