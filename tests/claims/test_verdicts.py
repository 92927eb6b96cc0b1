"""The verdict file: whole lines whoever writes, a torn one is reported, nothing of an interrupted
claim is kept."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from stratoscope.claims import Verdict, figure, verdicts
from stratoscope.claims.paper import read
from stratoscope.claims.run import run
from stratoscope.errors import ClaimError, InputError


@pytest.fixture
def verdict(folder: Path) -> Verdict:
    paper = read(folder / "llm_drop.py")
    return run(paper, paper.named("attention_goes_first")[0], seed=3)


def test_a_verdict_comes_back(tmp_path: Path, verdict: Verdict) -> None:
    odd = dataclasses.replace(
        verdict,
        values={"a": math.nan, "b": math.inf},
        interval={"a": (-math.inf, 1.0)},
        form=1,
        note='ü "\n',
        seed=4,
    )
    file = tmp_path / "llm-drop.jsonl"
    assert verdicts.append(verdict, [tmp_path]) == file
    verdicts.append(odd, [tmp_path])
    lines = file.read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        json.loads(line, parse_constant=pytest.fail)  # strict JSON: no bare NaN
    (first, second), problems = verdicts.read([tmp_path])
    assert problems == []
    assert first == verdict
    assert repr(second) == repr(odd)  # NaN is not equal to itself
    assert (first.seed, first.tier, first.n, first.status) == (3, "small", 40, "reproduced")
    assert set(first.versions) == {"stratoscope", "torch", "transformers"}


def test_what_refuses_its_material_was_no_test(folder: Path, tmp_path: Path) -> None:
    """A reason instead of numbers: kept, read again and shown. Only identity claims stop at it."""
    paper = read(folder / "llm_drop.py")
    small, identity = (paper.named(n)[0] for n in ("attention_goes_first", "nothing_costs_nothing"))
    verdict = run(paper, small, seed=6)
    assert (verdict.status, verdict.n, dict(verdict.numbers)) == ("no test", 0, {})
    assert verdict.why == ("it could not be measured: 5 heads are left in layer 16 to draw 9 from.")
    verdicts.append(verdict, [tmp_path])
    assert verdicts.read([tmp_path]) == ([verdict], [])
    with pytest.raises(RuntimeError, match="half-way"):
        run(paper, small, seed=8)
    with pytest.raises(InputError, match="nothing to drop"):
        run(paper, identity, seed=6)


@pytest.mark.parametrize("word", ["reproduced", "direction only", "not reproduced"])
def test_without_numbers_no_other_word_is_believed(folder: Path, tmp_path: Path, word: str) -> None:
    paper = read(folder / "llm_drop.py")
    refused = run(paper, paper.named("attention_goes_first")[0], seed=6)
    verdicts.append(dataclasses.replace(refused, status=word), [tmp_path])
    read_again, [problem] = verdicts.read([tmp_path])
    assert read_again == []
    assert f"it says '{word}' of attention_goes_first, and its numbers give 'no test'" in problem


def test_two_papers_touch_two_files(tmp_path: Path, verdict: Verdict) -> None:
    verdicts.append(verdict, [tmp_path])
    before = (tmp_path / "llm-drop.jsonl").read_bytes()
    verdicts.append(dataclasses.replace(verdict, key="lazy-neuron"), [tmp_path])
    assert (tmp_path / "llm-drop.jsonl").read_bytes() == before
    assert sorted(v.key for v in verdicts.read([tmp_path])[0]) == ["lazy-neuron", "llm-drop"]


def test_two_processes_at_once(tmp_path: Path, verdict: Verdict) -> None:
    """Long lines from two writers: each one whole, none lost."""
    file, line = tmp_path / "kept", tmp_path / "one"
    verdicts.append(dataclasses.replace(verdict, note="long " * 20_000), [line])
    program = (
        "import dataclasses, sys\nfrom pathlib import Path\nfrom stratoscope.claims import "
        "verdicts\n"
        "[one], _ = verdicts.read([Path(sys.argv[1])])\n"
        "for seed in range(40): verdicts.append(dataclasses.replace(one, seed=seed, "
        "claim=sys.argv[3]), [Path(sys.argv[2])])"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", program, line, file, name])
        for name in ("left", "right")
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    found, problems = verdicts.read([file])
    assert problems == []
    assert sorted((v.claim, v.seed) for v in found) == [
        (name, seed) for name in ("left", "right") for seed in range(40)
    ]


def test_a_torn_last_line_is_reported_and_stays_alone(tmp_path: Path, verdict: Verdict) -> None:
    file = verdicts.append(verdict, [tmp_path])
    with file.open("a") as half:
        half.write(verdicts.to_line(verdict)[:100])
    found, problems = verdicts.read([tmp_path])
    assert (len(found), len(problems)) == (1, 1)
    assert problems[0].startswith(f"Line 2 of {file} is cut short: its writing was interrupted")
    verdicts.append(dataclasses.replace(verdict, seed=9), [tmp_path])
    found, problems = verdicts.read([tmp_path])
    assert [v.seed for v in found] == [3, 9]
    assert problems[0].startswith(f"Line 2 of {file} is no verdict")


@pytest.mark.parametrize(
    "line", ["{}", "[]", "3", "null", '{"key": "x"}', "\x00\xff", '{"status": "fine"}']
)
def test_any_other_line_is_reported(tmp_path: Path, verdict: Verdict, line: str) -> None:
    (tmp_path / "llm-drop.jsonl").write_text(line + "\n")
    verdicts.append(verdict, [tmp_path])
    found, problems = verdicts.read([tmp_path])
    assert (found, len(problems)) == ([verdict], 1)


def test_a_status_that_is_no_word_is_reported(tmp_path: Path, verdict: Verdict) -> None:
    line = verdicts.to_line(verdict).replace('"reproduced"', '"splendid"')
    (tmp_path / "llm-drop.jsonl").write_text(line + "\n")
    assert "'splendid' is no status" in verdicts.read([tmp_path])[1][0]


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    home, cache = tmp_path / "home", tmp_path / "cache"
    real = os.open

    def refuse(path, *more, **options):
        if Path(path).parent == home:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert verdicts.append(verdict, [home, cache]) == cache / "llm-drop.jsonl"
    assert verdicts.read([home, cache]) == ([verdict], [])
    with pytest.raises(
        ClaimError, match=r"could not be kept .*Permission denied.*It was: reproduced"
    ):
        verdicts.append(verdict, [home])


def test_a_full_disk_leaves_no_half_line(
    tmp_path: Path, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    file, real = verdicts.append(verdict, [tmp_path]), os.write
    before = file.read_bytes()
    monkeypatch.setattr(
        os,
        "write",
        lambda handle, data: real(handle, data[:50]) if len(data) > 50 else real(handle, data),
    )
    with pytest.raises(ClaimError, match="disk is full"):
        verdicts.append(verdict, [tmp_path])
    assert file.read_bytes() == before


@pytest.mark.parametrize("seed", [8, 9])
def test_an_interrupted_claim_keeps_nothing(folder: Path, seed: int) -> None:
    paper = read(folder / "llm_drop.py")
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        verdicts.append(run(paper, paper.named("attention_goes_first")[0], seed))
    assert not list(folder.rglob("*.jsonl"))


def test_a_figure_comes_back() -> None:
    values = np.array([[0.123456789, np.nan], [1e-12, -3.0], [5.0, 6.0]])
    words = np.array(["one", "two words"], dtype=object)
    coords = {"layer": [0, 4, 8], "component": words, "depth": ("layer", [0.0, 0.5, np.inf])}
    array = xr.DataArray(
        values, coords, ("layer", "component"), name="x", attrs={"unit": "logits", "method": "m"}
    )
    data = json.loads(json.dumps(figure.encode(array), allow_nan=False))
    back = figure.decode(data)
    np.testing.assert_allclose(back.values, values, rtol=1e-5)
    assert back.dims == array.dims
    assert back["component"].values.tolist() == ["one", "two words"]
    assert (back.name, back.attrs) == ("x", {"unit": "logits"})
    assert figure.encode(back) == data | {
        "coords": data["coords"] | {"depth": {"dims": ["layer"], "values": [0, 0.5, None]}}
    }
    with pytest.raises(ClaimError, match="holds numbers"):
        figure.encode(array["component"])
    with pytest.raises(ClaimError, match="cannot be read"):
        figure.decode({"values": [1]})
