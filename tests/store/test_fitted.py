"""What was fitted: the same bits after save and load, and a sentence for what is no such fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stratoscope.errors import InputError, LoadError
from stratoscope.store import tensors as files
from stratoscope.store.fitted import Fitted


@dataclass(frozen=True, eq=False, kw_only=True)
class Lens(Fitted):
    weight: Tensor
    by_layer: Mapping[str, Tensor]
    names: Any


@dataclass(frozen=True, eq=False, kw_only=True)
class Other(Fitted):
    weight: Tensor


def lens(seed: int = 0) -> Lens:
    torch.manual_seed(seed)
    return Lens(
        settings={"rate": 0.1, "sites": ("a", "b")},
        seed=seed,
        provenance={"model": "tiny", "weights": "1f2e"},
        weight=torch.randn(3, 4).T,
        by_layer={"layers.0": torch.randn(2), "a/b": torch.randn(2).bfloat16()},
        names={"first": [1, None, "ä"]},
    )


def same(one: Fitted, other: Fitted) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(x, other.tensors[name]) for name, x in one.tensors.items())
    for name in ("settings", "seed", "provenance", "code"):
        assert getattr(one, name) == getattr(other, name)


def test_a_fit_is_the_same_after_save_and_load(tmp_path: Path) -> None:
    fit = lens()
    again = Lens.load(fit.save(tmp_path / "deep" / "fit"))
    same(fit, again)
    assert again.names == fit.names == {"first": [1, None, "ä"]}
    assert list(again.by_layer) == ["a/b", "layers.0"]
    assert again.weight.shape == (4, 3)
    assert fit.settings["sites"] == ["a", "b"]  # as JSON has it, before and after
    assert len(fit.code) == 8
    again.save(tmp_path / "twice")
    one, two = (
        json.loads((p / "fitted.json").read_text())
        for p in (tmp_path / "twice", tmp_path / "deep" / "fit")
    )
    assert one == two


def test_a_second_fit_replaces_the_first_and_leaves_other_files(tmp_path: Path) -> None:
    lens(0).save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    lens(1).save(tmp_path)
    same(Lens.load(tmp_path), lens(1))
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors", ".txt"]


@pytest.mark.parametrize("name", ["fitted.json", "safetensors"])
def test_an_interruption_leaves_the_old_fit(name: str, tmp_path: Path, monkeypatch) -> None:
    lens(0).save(tmp_path)
    move = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith(name):
            raise OSError("No space left")
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(LoadError, match=r"could not be written.*No space left"):
            lens(1).save(tmp_path)
    same(Lens.load(tmp_path), lens(0))


def test_every_folder_that_is_no_such_fit_gets_its_sentence(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(LoadError, match="which does not exist"):
        Lens.load(tmp_path / "nowhere")
    with pytest.raises(LoadError, match=r"holds no fitted\.json"):
        Lens.load(tmp_path)
    lens().save(tmp_path)
    with pytest.raises(LoadError, match=r"holds a fit of \S+Lens, not of \S+Other"):
        Other.load(tmp_path)
    with monkeypatch.context() as later:
        later.setattr(files, "FORMAT", 7)
        lens().save(tmp_path / "newer")
    with pytest.raises(LoadError, match="format 7 of a newer stratoscope"):
        Lens.load(tmp_path / "newer")


@pytest.mark.parametrize(
    "damage", ["bit", "missing", "json", "no key", "field", "elsewhere", "not a table"]
)
def test_a_damaged_fit_is_refused(damage: str, tmp_path: Path) -> None:
    lens().save(tmp_path / "fit")
    [file], told = (tmp_path / "fit").glob("*.safetensors"), tmp_path / "fit" / "fitted.json"
    about = json.loads(told.read_text())
    if damage == "bit":
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    elif damage == "missing":
        file.unlink()
    elif damage == "json":
        told.write_text(told.read_text()[:-20])
    elif damage == "not a table":
        told.write_text("[1]")
    elif damage == "no key":
        told.write_text(json.dumps({k: v for k, v in about.items() if k != "sha256"}))
    elif damage == "field":
        told.write_text(json.dumps(about | {"fields": {"extra": 1} | about["fields"]}))
    elif damage == "elsewhere":  # a name that leads out of the folder is not followed
        file.rename(tmp_path / file.name)
        told.write_text(json.dumps(about | {"tensors": f"../{file.name}"}))
    with pytest.raises(LoadError, match=r"damaged|another version of the method"):
        Lens.load(tmp_path / "fit")


def test_what_json_cannot_hold_is_refused_when_it_is_fitted() -> None:
    for value in (object(), float("nan"), {"x": {1, 2}}):
        with pytest.raises(InputError, match=r"Other\.settings is no tensor, and JSON cannot"):
            Other(settings={"x": value}, seed=0, provenance={}, weight=torch.ones(1))


def test_a_real_fit_is_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    from stratoscope.layers.concept_depth import Probes

    about = {"settings": {}, "seed": 0, "provenance": {}}
    names = {"correct": torch.ones(3, 2), "null_correct": torch.zeros(3, 2), "bias": torch.ones(2)}
    fit = Probes(weight=torch.randn(2, 4), **names, **about)
    fit.save(tmp_path)
    program = (
        "import sys; from stratoscope.layers.concept_depth import Probes\n"
        "print(Probes.load(sys.argv[1]).weight.double().sum().item().hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == fit.weight.double().sum().item().hex()
