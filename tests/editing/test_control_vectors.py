"""Files of llama.cpp, repeng and lm-eval: what is written is what they read, by their own steps,
and what they wrote steers here as it does there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from stratoscope.editing import control_vectors, steer
from stratoscope.engine.metric import last_logits
from stratoscope.errors import InputError, LoadError, SiteError
from stratoscope.models import LM
from support.subjects import CORRUPT, ROWS, close, lm_of


def fitted(lm: LM, **more: object) -> steer.Steering:
    return steer.fit(lm, list(zip(ROWS, CORRUPT)), **more)


def as_theirs(path: Path, **more: object) -> None:
    """A control vector as repeng writes it, or, with `more`, one that is wrong."""
    given = {
        "kind": "controlvector",
        "hint": "llama",
        "tensors": {n: np.full(32, n, dtype=np.float32) for n in (1, 2)},
        "name": "direction.",
    } | more
    writer = gguf.GGUFWriter(path, given["kind"])
    if given["hint"]:
        writer.add_string("controlvector.model_hint", given["hint"])
    writer.add_uint32("controlvector.layer_count", len(given["tensors"]))
    for layer, vector in given["tensors"].items():
        writer.add_tensor(f"{given['name']}{layer}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_control_vector_is_read_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    lm = lm_of("llama")
    found = fitted(lm)
    path = tmp_path / "v.gguf"
    control_vectors.write_gguf(found, path, layers=[1, 2], strength=2.0)
    file = gguf.GGUFReader(path)
    held = {tensor.name: np.array(tensor.data) for tensor in file.tensors}
    assert sorted(held) == ["direction.1", "direction.2"]
    for layer in (1, 2):
        own = held[f"direction.{layer}"]
        assert own.dtype == np.float32
        assert np.array_equal(own, 2 * found.vectors[f"layers.{layer}.resid_post"].numpy())
    words = {
        key: bytes(file.get_field(key).parts[-1]).decode()
        for key in ("general.architecture", "controlvector.model_hint")
    }
    assert words == {"general.architecture": "controlvector", "controlvector.model_hint": "llama"}
    assert int(file.get_field("controlvector.layer_count").parts[-1][0]) == 2


def test_a_control_vector_goes_round_bit_for_bit(tmp_path: Path) -> None:
    lm = lm_of("llama")
    found = fitted(lm)
    control_vectors.write_gguf(found, tmp_path / "v.gguf", layers=[1, 2])
    back = control_vectors.read_gguf(tmp_path / "v.gguf", lm)
    assert sorted(back.vectors) == ["layers.1.resid_post", "layers.2.resid_post"]
    assert all(torch.equal(x, found.vectors[name]) for name, x in back.vectors.items())
    with steer.edit(lm, found, layers=[1, 2], strength=1.5):
        expected = last_logits(lm, ROWS)
    with steer.edit(lm, back, layers="all", strength=1.5):
        assert torch.equal(last_logits(lm, ROWS), expected)
    control_vectors.write_gguf(back, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "v.gguf").read_bytes()


def test_a_file_of_repeng_s_steers_the_layer_it_names(tmp_path: Path) -> None:
    """direction.N is added to what layer N, counted from 0, gives."""
    lm = lm_of("llama")
    as_theirs(tmp_path / "theirs.gguf")
    found = control_vectors.read_gguf(tmp_path / "theirs.gguf", lm)
    handles = [
        lm.model.model.layers[n].register_forward_hook(lambda _, __, out, n=n: out + 0.1 * n)
        for n in (1, 2)
    ]
    with torch.no_grad():
        expected = lm.model(torch.tensor([ROWS[0]])).logits[0, -1]
    for handle in handles:
        handle.remove()
    with steer.edit(lm, found, layers="all", strength=0.1):
        close(last_logits(lm, ROWS[:1])[0], expected, 1e-5)


def test_control_vectors_of_another_model_are_refused(tmp_path: Path) -> None:
    lm, path = lm_of("llama"), tmp_path / "v.gguf"
    as_theirs(path, hint="qwen2")
    with pytest.raises(InputError, match="control vector of 'qwen2', and this model is a 'llama'"):
        control_vectors.read_gguf(path, lm)
    assert len(control_vectors.read_gguf(path, lm, foreign=True).vectors) == 2
    assert control_vectors.read_gguf(path).settings["model_type"] == "qwen2"
    as_theirs(path, tensors={1: np.ones(48, dtype=np.float32)})
    with pytest.raises(InputError, match=r"layers.1.resid_post` has the shape \(48,\)"):
        control_vectors.read_gguf(path, lm)
    as_theirs(path, tensors={7: np.ones(32, dtype=np.float32)})
    with pytest.raises(SiteError, match="layer 7 of 3"):
        control_vectors.read_gguf(path, lm)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kind": "llama"}, "a GGUF of 'llama', not a control vector"),
        ({"tensors": {}}, "no direction.N"),
        ({"name": "blk."}, "holds 'blk.1'"),
        ({"tensors": {1: np.ones((2, 32), dtype=np.float32)}}, r"of float32 \(2, 32\)"),
        ({"tensors": {1: np.ones(32, dtype=np.float16)}}, "of float16"),
    ],
)
def test_what_is_no_control_vector_is_refused(tmp_path: Path, wrong: dict, said: str) -> None:
    as_theirs(tmp_path / "v.gguf", **wrong)
    with pytest.raises(LoadError, match=said):
        control_vectors.read_gguf(tmp_path / "v.gguf")


def test_files_that_are_no_files_of_the_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "v.gguf").write_bytes(b"GGUFnothing more")
    for path in (tmp_path / "v.gguf", tmp_path / "none.gguf"):
        with pytest.raises(LoadError, match="cannot be read as GGUF"):
            control_vectors.read_gguf(path)
    lm = lm_of("llama")
    with pytest.raises(InputError, match="refuses a direction of layer 0"):
        control_vectors.write_gguf(fitted(lm), tmp_path / "w.gguf")
    heads = fitted(lm, site="layers.1.attn.z")
    with pytest.raises(InputError, match="what a whole layer gives, resid_post"):
        control_vectors.write_gguf(heads, tmp_path / "w.gguf")
    one = fitted(lm, site="layers.1.resid_post")
    with pytest.raises(LoadError, match="could not be written"):
        control_vectors.write_gguf(one, tmp_path / "no" / "w.gguf")
    bare = steer.read(lm, {"layers.1.resid_post": torch.ones(32)})
    with pytest.raises(InputError, match="give model_type="):
        control_vectors.write_gguf(bare, tmp_path / "w.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.gguf"]


def as_lm_eval(lm: LM, path: Path) -> torch.Tensor:
    """Last logits of the first row with hooks as lm-eval's `steered` model makes them."""
    table = torch.load(path, weights_only=False)
    handles = []
    for name, module in lm.model.base_model.named_modules():
        if name in table:
            row = table[name]
            assert row["action"] == "add"
            assert row["bias"] is None is row["head_index"]
            added = row["steering_vector"] * row["steering_coefficient"]

            def hook(_: object, __: object, out: object, added: torch.Tensor = added) -> object:
                return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

            handles.append(module.register_forward_hook(hook))
    assert len(handles) == len(table)
    with torch.no_grad():
        logits = lm.model(torch.tensor([ROWS[0]])).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_lm_eval_s_hooks_steer_as_the_edit_does(name: str, tmp_path: Path) -> None:
    lm, path = lm_of(name), tmp_path / "v.pt"
    found = fitted(lm)
    control_vectors.write_lm_eval(lm, found, path, layers=[0, 2], strength=1.5)
    with steer.edit(lm, found, layers=[0, 2], strength=1.5):
        ours = last_logits(lm, ROWS[:1])[0]
    close(ours, as_lm_eval(lm, path), 1e-5)
    back = control_vectors.read_lm_eval(lm, path)
    with steer.edit(lm, back, layers="all"):
        close(last_logits(lm, ROWS[:1])[0], ours, 1e-6)
    assert torch.equal(back.vectors["layers.2.resid_post"],
                       1.5 * found.vectors["layers.2.resid_post"])  # fmt: skip


def test_lm_eval_s_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    lm, path = lm_of("llama"), tmp_path / "v.pt"
    row = {"steering_vector": torch.ones(32), "steering_coefficient": 2.0, "action": "add"}
    wrong: list[tuple[dict, str]] = [
        ({"layers.1": row | {"action": "clamp"}}, "action 'clamp' at 'layers.1'"),
        ({"layers.1": row | {"head_index": 1}}, "action 'add' at 'layers.1'"),
        ({"h.1": row}, "a module 'h.1'"),
        ({"layers.1": row | {"steering_vector": torch.ones(8)}}, r"has the shape \(8,\)"),
    ]
    for table, said in wrong:
        torch.save(table, path)
        with pytest.raises(InputError, match=said):
            control_vectors.read_lm_eval(lm, path)
    torch.save({"layers.1": {"action": "add"}}, path)
    with pytest.raises(LoadError, match="cannot be read as lm-eval's"):
        control_vectors.read_lm_eval(lm, path)
    with pytest.raises(InputError, match=r"\.pt or \.pth"):
        control_vectors.write_lm_eval(lm, fitted(lm), tmp_path / "v.bin", layers=1)
    other = steer.read(lm, {"layers.1.resid_post": torch.ones(8)})
    with pytest.raises(InputError, match="is of another model"):
        control_vectors.write_lm_eval(lm, other, path)


class Trap:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (self.folder,)


def test_a_file_that_would_call_something_is_not_run(tmp_path: Path) -> None:
    torch.save({"layers.1": Trap(tmp_path / "made")}, tmp_path / "v.pt")
    with pytest.raises(LoadError, match="cannot be read as lm-eval's"):
        control_vectors.read_lm_eval(lm_of("llama"), tmp_path / "v.pt")
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "v.pt", weights_only=False)  # the wrong way to read it
    assert (tmp_path / "made").exists()
