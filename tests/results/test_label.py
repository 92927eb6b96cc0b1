"""label and dataset: words and sizes are checked, values keep their precision, provenance is
stamped."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from stratoscope.errors import ResultError
from stratoscope.results import AXES, axes, dataset, label


def test_label_names_axes_and_stamps_provenance() -> None:
    result = label(
        [[0.5, 0.25]],
        ("example", "position"),
        name="attribution",
        method="tokens.occlusion",
        provenance={"model": "tiny", "versions": {"torch": "2"}},
        settings={"step": np.int64(3), "path": Path("a")},
        seed=7,
        coords={"text": (("example", "position"), [["a", "b"]])},
        answer=" Paris",
    )
    assert result.name == "attribution"
    assert result.dims == ("example", "position")
    assert result.attrs["method"] == "tokens.occlusion"
    assert json.loads(result.attrs["provenance"]) == {"model": "tiny", "versions": {"torch": "2"}}
    assert json.loads(result.attrs["settings"]) == {"step": 3, "path": "a"}
    assert (result.attrs["seed"], result.attrs["answer"]) == (7, " Paris")
    assert result["text"].values.tolist() == [["a", "b"]]


def test_seed_is_absent_when_there_is_none() -> None:
    assert "seed" not in label(1.0, (), name="x", method="m").attrs


def test_dataset_shares_axes_and_coordinates() -> None:
    result = dataset(
        {"score": (("layer", "role"), np.zeros((2, 3))), "null": ("role", [1.0, 2.0, 3.0])},
        method="heads.roles",
        coords={"role": ["induction", "copying", "name_mover"]},
    )
    assert dict(result.sizes) == {"layer": 2, "role": 3}
    assert float(result["null"].sel(role="copying")) == 2.0


@pytest.mark.parametrize(
    ("tensor", "dtype"),
    [
        (torch.tensor([1.0, 2.5], dtype=torch.bfloat16), np.float32),
        (torch.tensor([1.0, 2.5], dtype=torch.float16), np.float32),
        (torch.tensor([0.1], dtype=torch.float64), np.float64),
        (torch.tensor([2**24 + 1]), np.int64),  # a token id that float32 would round
        (torch.tensor([True, False]), np.bool_),
        (torch.ones(3, requires_grad=True), np.float32),
    ],
)
def test_tensors_keep_their_values(tensor: torch.Tensor, dtype: type) -> None:
    result = label(tensor, "neuron", name="x", method="m")
    assert result.dtype == dtype
    assert result.values.tolist() == tensor.tolist()


def test_values_are_copied() -> None:
    tensor = torch.zeros(2)
    result = label(tensor, "dim", name="x", method="m")
    tensor += 1
    assert result.values.tolist() == [0.0, 0.0]


def test_text_keeps_trailing_null_characters() -> None:
    result = label(["a\x00", "", "é"], "rank", name="token", method="m")
    assert result.values.tolist() == ["a\x00", "", "é"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], "heads"), "uses 'heads', which is not an axis word; nearest: head"),
        (([1.0], "zzz"), "the words are example, layer"),
        (([[1.0]], "head"), "has 2 axes, shape (1, 1), but 1 words: ('head',)"),
        (([[1.0]], ("head", "head")), "names an axis twice"),
        (([[1.0], [1.0, 2.0]], ("head", "dim")), "is not a regular array"),
        ((["a", 1], "rank"), "mixes text with something else"),
        (([1j], "rank"), "has dtype complex128"),
        (([None], "rank"), "mixes text"),
    ],
)
def test_refusals_of_values(arguments: tuple, message: str) -> None:
    with pytest.raises(ResultError, match=re.escape(message)):
        label(*arguments, name="x", method="m")


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        ({"layer": [0, 1, 2]}, "Axis 'layer' has size 2 in 'x' but 3 in 'layer'"),
        (
            {"text": ("position", ["a"])},
            "Coordinate 'text' has axes ('position',), but 'x' has only ('layer',)",
        ),
        ({"text": ["a", "b"]}, "'text' uses 'text', which is not an axis word"),
        ({"role": ("induction", "copying")}, "uses 'induction', which is not an axis word"),
        ({"layer": ("layer", [0], 1)}, "was given as 3 things"),
        ({"x": ("layer", [0, 1])}, "'x' names both a variable and an axis or coordinate"),
        ({"layer": ((), 3)}, "its only axis must be 'layer'"),
    ],
)
def test_refusals_of_coordinates(coords: dict, message: str) -> None:
    with pytest.raises(ResultError, match=re.escape(message)):
        label([1.0, 2.0], "layer", name="x", method="m", coords=coords)


def test_refusals_name_both_variables() -> None:
    with pytest.raises(ResultError, match="Axis 'head' has size 2 in 'effect' but 3 in 'null'"):
        dataset({"effect": ("head", [1, 2]), "null": ("head", [1, 2, 3])}, method="m")
    with pytest.raises(ResultError, match="'layer' names both"):
        dataset({"layer": ("head", [1, 2]), "null": ("layer", [1, 2])}, method="m")


def test_every_axis_word_has_a_meaning_of_one_line() -> None:
    assert all(
        word.isidentifier() and meaning and "\n" not in meaning for word, meaning in AXES.items()
    )
    own = axes.declared()
    assert own["tokens/transition_loss.py"].keys() == {"transition"}
    for file, table in own.items():
        assert all(
            word.isidentifier() and meaning and "\n" not in meaning
            for word, meaning in table.items()
        ), file
        assert not table.keys() & AXES.keys(), (
            f"{file} takes a word that means something else everywhere"
        )


def test_a_method_may_use_the_words_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("stratoscope.layers.planted")
    monkeypatch.setitem(sys.modules, "stratoscope.layers.planted", module)
    with pytest.raises(ResultError, match="'crystal', which is not an axis word"):
        label([1.0, 2.0], "crystal", name="x", method="layers.planted")
    module.AXES = {"crystal": "a made-up thing"}
    assert label([1.0, 2.0], "crystal", name="x", method="layers.planted").dims == ("crystal",)
    with pytest.raises(ResultError, match="not an axis word"):
        label([1.0, 2.0], "crystal", name="x", method="layers.another")


def test_words_declared_in_files_are_found(tmp_path) -> None:
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "one.py").write_text('AXES = {"no": "first line"}\n')
    (tmp_path / "layers" / "two.py").write_text(
        'import os\n\nAXES: dict[str, str] = {"crystal": "made up"}\n'
    )
    (tmp_path / "layers" / "three.py").write_text("import os\n\nAXES = os.environ\n")
    assert axes.declared(tmp_path) == {"layers/two.py": {"crystal": "made up"}}
