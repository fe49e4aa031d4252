"""Children of a process that compiles: they hang at nothing, run what was compiled, and compile what is new."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fork_program
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

NEW, REUSED = "compiled, new", "compiled, reused"


def result_of(program: str, folder: Path) -> Any:
    """What one of the programs printed; Inductor's cache on disk is empty when it starts."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    command = [sys.executable, fork_program.__file__, program]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_child_runs_what_was_compiled_and_compiles_what_is_new(tmp_path):
    (told, childs_stats), parents_stats = result_of("warm_and_new", tmp_path)
    assert told == [REUSED, NEW, REUSED]
    assert childs_stats == {"compiles": 2, "hits": 4, "fallbacks": 0, "asides": 0, "loads": 0}
    assert parents_stats == {"compiles": 1, "hits": 1, "fallbacks": 0, "asides": 0, "loads": 0}


def test_a_fork_waits_for_what_another_thread_compiles(tmp_path):
    childs, parents = result_of("while_compiling", tmp_path)
    assert childs == [REUSED, REUSED, NEW]
    assert parents == REUSED


def test_a_child_of_a_process_that_is_still_compiling_runs_natively_what_is_new(tmp_path):
    childs, parents = result_of("while_compiling_for_long", tmp_path)
    forked = "the process was forked while another thread compiled"
    assert childs == [REUSED, forked, forked]
    assert parents == REUSED


def test_a_child_has_no_lock_that_nobody_frees(tmp_path):
    assert result_of("while_locks_are_held", tmp_path) == [[REUSED], ["is being compiled in the background", REUSED]]


def test_a_child_compiles_in_a_background_of_its_own(tmp_path):
    assert result_of("in_the_background", tmp_path) == [REUSED, "is being compiled in the background", REUSED]


def test_processes_of_multiprocessing(tmp_path):
    assert result_of("with_multiprocessing", tmp_path) == {"fork": [REUSED, NEW], "spawn": [NEW, NEW]}
