"""Tensors in a file: the very bits come back, and what is foreign, damaged or newer is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stratoscope.errors import LoadError
from stratoscope.store import tensors

KINDS = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]


def test_the_bits_come_back_whatever_the_dtype_layout_and_sharing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = torch.randn(4, 6)
    given = {str(kind): whole.to(kind) for kind in KINDS}
    given |= {"turned": whole.T, "same": whole, "again": whole, "scalar": torch.tensor(3.0)}
    given |= {"nan": torch.tensor([float("nan"), -0.0]), "none": torch.empty(0, 3)}
    about = {"words": ["ä", 1, 2.5, None]}
    tensors.write(tmp_path / "file", given, kind="test", about=about)
    found, told = tensors.read(tmp_path / "file", kind="test")
    assert told == about
    assert found.keys() == given.keys()
    for name, value in given.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        ours, theirs = (x.contiguous().flatten().view(torch.uint8) for x in (found[name], value))
        assert torch.equal(ours, theirs), name
    tensors.write(tmp_path / "again", found, kind="test", about=about)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_damaged_file_is_refused(kept: int, tmp_path: Path) -> None:
    tensors.write(tmp_path / "file", {"x": torch.ones(8)}, kind="test")
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:kept])
    with pytest.raises(LoadError, match="damaged"):
        tensors.read(tmp_path / "file", kind="test")


def test_another_kind_and_a_newer_file_are_told(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    with pytest.raises(LoadError, match="does not exist"):
        tensors.read(path, kind="test")
    tensors.write(path, {"x": torch.ones(1)}, kind="sweep")
    with pytest.raises(LoadError, match="was to hold 'edit', and holds 'sweep'"):
        tensors.read(path, kind="edit")
    save_file({"x": torch.ones(1)}, tmp_path / "stranger")
    with pytest.raises(LoadError, match="holds other tensors"):
        tensors.read(tmp_path / "stranger", kind="edit")
    assert tensors.read(tmp_path / "stranger", kind=None)[0].keys() == {"x"}
    with monkeypatch.context() as later:
        later.setattr(tensors, "FORMAT", 2)
        tensors.write(path, {"x": torch.ones(1)}, kind="edit")
    with pytest.raises(LoadError, match="format 2 of a newer stratoscope"):
        tensors.read(path, kind="edit")


def test_an_interruption_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    tensors.write(path, {"x": torch.zeros(1)}, kind="test")

    def full(*_: object) -> None:
        raise OSError("No space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            tensors.write(path, {"x": torch.ones(1)}, kind="test")
    assert float(tensors.read(path, kind="test")[0]["x"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
