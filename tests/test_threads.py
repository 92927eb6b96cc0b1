"""Threads wait asleep and leave taken cores alone, unless the user has said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from stratoscope import _threads

PRINT = "import os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('OMP_NUM_THREADS'))"


def told(program: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-c", f"{program}\n{PRINT}"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_threads_wait_asleep_once_stratoscope_is_imported() -> None:
    assert told("import stratoscope") == "PASSIVE None"


@pytest.mark.parametrize(
    ("name", "value"),
    [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "5"), ("KMP_BLOCKTIME", "1")],
)
def test_the_user_s_own_setting_wins(name: str, value: str) -> None:
    kept = value if name == "OMP_WAIT_POLICY" else None
    assert told("import stratoscope", **{name: value}) == f"{kept} None"


def test_a_torch_that_is_loaded_is_left_alone() -> None:
    program = (
        "import sys, types; sys.modules['torch'] = types.ModuleType('torch')\nimport stratoscope"
    )
    assert told(program) == "None None"


@pytest.mark.parametrize(
    ("shares", "threads"), [([0, 0], 2), ([1, 0], 1), ([0.6, 0.6], 1), ([1, 1], 1), ([0.2, 0.1], 2)]
)
def test_as_many_threads_as_cores_are_free(
    shares: list[float], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = 0.15 * os.sysconf("SC_CLK_TCK")
    watched = iter([[100, 900], [100 + shares[0] * whole, 900 + shares[1] * whole]])
    monkeypatch.setattr(_threads, "_busy", lambda: next(watched))
    monkeypatch.setattr(_threads, "_chosen", lambda *endings: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    _threads.use_free_cores()
    assert os.environ["OMP_NUM_THREADS"] == str(threads)


def test_the_user_s_number_of_threads_wins() -> None:
    program = "from stratoscope._threads import use_free_cores; use_free_cores()"
    assert told(program, OMP_NUM_THREADS="3") == "PASSIVE 3"
    assert told(program).startswith("PASSIVE ")
    assert 1 <= int(told(program).split()[1]) <= len(os.sched_getaffinity(0))


def test_a_machine_without_proc_stat_keeps_torch_s_own_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_threads, "_busy", list)
    monkeypatch.setattr(_threads, "_chosen", lambda *endings: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    _threads.use_free_cores(0.0)
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_this_process_s_own_cores_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    # this process may be one that gives way, whose ticks (field 2) are not counted
    monkeypatch.setattr(_threads, "_BUSY", (*_threads._BUSY, 2))
    before = _threads._busy()
    assert len(before) == len(os.sched_getaffinity(0))
    sum(range(10**7))
    assert sum(_threads._busy()) > sum(before)
