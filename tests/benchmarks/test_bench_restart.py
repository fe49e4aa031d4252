"""The ``restart`` command: that its processes do what they are timed at, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import restart
from benchmarks.__main__ import main
from benchmarks.restart import COLD, SCHEMA, WAY_LOADED, WAYS, Results

pytestmark = pytest.mark.run_once


def test_a_cold_process_compiles_and_the_next_one_loads(tmp_path):
    tmp_path.chmod(0o700)
    cold = restart._first_call(COLD, "silu_and_mul", "cpu", tmp_path, WAYS[COLD])
    loaded = restart._first_call(WAY_LOADED, "silu_and_mul", "cpu", tmp_path, WAYS[WAY_LOADED])
    assert cold > loaded > 0


def test_a_process_that_does_something_else_is_no_measurement(tmp_path, monkeypatch):
    done = restart.subprocess.CompletedProcess([], 0, stdout='{"seconds": 1.0, "compiles": 1, "loads": 0}\n')
    monkeypatch.setattr(restart.subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(RuntimeError, match="silu_and_mul, ours, loaded: 1 compilations and 0 loads"):
        restart._first_call(WAY_LOADED, "silu_and_mul", "cpu", tmp_path, WAYS[WAY_LOADED])


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"silu_and_mul, ours, loaded: .*No such file or directory"):
        restart._first_call(WAY_LOADED, "silu_and_mul", "cpu", tmp_path, WAYS[WAY_LOADED])


@pytest.fixture
def written(tmp_path: Path) -> Path:
    seconds = {name: [2.0, 1.0, 3.0] for name in WAYS}
    seconds[WAY_LOADED] = [0.02, 0.01, 0.5]
    results = Results({"cpu": "A CPU, 2 cores", "torch": "2.13.0", "python": "3.11"}, "cpu", {"rms_norm": seconds})
    path = tmp_path / "results.json"
    path.write_text(results.to_json())
    return path


def test_medians_and_their_ratio(written, capsys):
    assert main(["restart", "--from-json", str(written), "--markdown"]) == 0
    caption, title, *table = capsys.readouterr().out.strip().split("\n\n")
    assert caption == "A CPU, 1 thread, torch 2.13.0, python 3.11."
    assert title == "Seconds until the first result:"
    assert table[0].splitlines()[-1] == "| rms_norm | 2.0 | 2.0 | 2.0 | 2.0 | 0.0200 | 100 |"


def test_what_is_read_is_written_again(written, tmp_path, capsys):
    again = tmp_path / "again.json"
    assert main(["restart", "--from-json", str(written), "--json", str(again)]) == 0
    assert json.loads(again.read_text()) == json.loads(written.read_text())
    assert json.loads(again.read_text())["schema"] == SCHEMA


def test_a_file_of_another_command(tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"schema": 1}')
    with pytest.raises(SystemExit):
        main(["restart", "--from-json", str(tmp_path / "other.json")])
    assert "holds no results of this benchmark" in capsys.readouterr().err
