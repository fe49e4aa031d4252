"""The ``numerics`` command: what it measures, what it writes, and what it shows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import numerics
from benchmarks import numerics_results as results
from benchmarks.__main__ import main
from benchmarks.cases import CASES
from benchmarks.numerics_results import Results, Row
from benchmarks.peers import EAGER, Ours
from benchmarks.proof import Broken
from benchmarks.ulps import Distance

NONE, ONE, NAN = Distance(1000, 0, 0), Distance(1000, 4, 1), Distance(1000, 123, math.inf)
DISTANCES = {"default": {"unit": ONE, "rough": NAN}, "bitwise": {"unit": NONE, "rough": NONE}}
TIMES = {
    "host": {"eager": 8.0, "default": 2.0, "bitwise": 4.0},
    "device": {"eager": 3.0, "default": 3.0, "bitwise": 6.0},
}
FOUND = Results(
    {"cpu": "A CPU, 2 cores", "torch": "2.13.0", "python": "3.11"},
    "cpu",
    1,
    (7, 1024),
    4096,
    (Row("rms_norm", "bf16", DISTANCES, TIMES),),
)


def test_reading_gives_what_was_written(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(FOUND.to_json())
    assert results.read(path) == FOUND


def test_table():
    header, _, row = results.markdown(FOUND).splitlines()[-3:]
    assert header.count("|") == row.count("|")
    assert row == "| rms_norm | bf16 | 0.004, 1 | 0.12, NaN for a number | equal | equal | 0.50 | 2.00 |"
    assert "0.004, 1" in results.text(FOUND)


def test_table_of_a_gpu_has_both_kinds_of_time():
    row = results.markdown(replace(FOUND, device="cuda")).splitlines()[-1]
    assert row.endswith("| equal | equal | 0.50 | 2.00 | 2.00 | 2.00 |")


@pytest.fixture
def one_case(monkeypatch):
    monkeypatch.setattr(numerics, "CASES", {"quant_fp8_static": CASES["quant_fp8_static"]})
    monkeypatch.setattr(numerics, "DTYPES", {"fp32": torch.float32})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_it_measures(one_case, tmp_path: Path, capsys):
    path = tmp_path / "results.json"
    assert main(["numerics", "--device", "cpu", "--hidden", "1003", "--json", str(path)]) == 0
    assert "quant_fp8_static" in capsys.readouterr().out
    (row,) = results.read(path).rows
    elements = sum(numerics.TOKENS) * 1003
    assert row.distances["bitwise"] == {kind: Distance(elements, 0, 0) for kind in results.KINDS_OF_INPUTS}
    assert set(row.times) == {"host"}
    assert set(row.times["host"]) == {EAGER, results.DEFAULT, results.BITWISE}
    assert min(row.times["host"].values()) > 0


def test_what_runs_eagerly_is_not_measured(one_case, monkeypatch):
    monkeypatch.setattr(Ours, "__init__", not_catching(Ours.__init__))
    with pytest.raises(Broken, match="quant_fp8_static did not run compiled"):
        numerics.run("cpu", 64)


def not_catching(init):
    def made(self, *args):
        init(self, *args)
        self.mode = type(self.mode)(ops=[])

    return made


def test_bad_arguments(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["numerics", "--hidden", "0"])
    assert "not a whole number" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["numerics", "--from-json", str(tmp_path / "none.json")])
    assert "none.json" in capsys.readouterr().err
