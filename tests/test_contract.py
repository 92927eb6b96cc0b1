"""One suite for every method that the catalogue finds: what its verb promises holds on models of
several families.

A method is called with what `ARGUMENTS` gives for its parameters' names, so a new method needs no
line here unless it asks for a new kind of thing. Whether a method supports a family is its own say:
it may refuse, with a reason.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
import xarray as xr

from stratoscope import catalogue
from stratoscope.engine.edit import Edit
from stratoscope.errors import FamilyError, InputError, SiteError
from stratoscope.lab import planted
from stratoscope.models import LM, wrap
from stratoscope.models.attention import configs_of
from stratoscope.results import axes as words_of
from stratoscope.results import load, save
from support import tiny

# rooms whose methods run hundreds of passes are tried on fewer families
FEWER = {"circuits": ("gpt2", "bert")}
SUBJECTS = (
    "planted",
    "llama",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "phi3",
    "opt",
    "bert",
    "bloom",
    "mixtral",
)
MEASURES = [entry.address for entry in catalogue.methods() if "measure" in entry.verbs]
EDITS = [entry.address for entry in catalogue.methods() if "edit" in entry.verbs]
TOKEN_AXES = ("position", "query", "key")
REFUSALS = (SiteError, InputError, FamilyError)
TOLERANCE = 1e-4
# below this, values are compared as if they were so large: an error of rounding has no relative
# error
SMALL = 0.05
UNITS = [(0, 3), (1, 7), (1, 0)]
SUPPORT: dict[str, dict[str, str]] = {}


@cache
def subject(name: str) -> LM:
    if name == "planted":
        p = planted.induction()
        return wrap(p.model, p.tokenizer)
    return wrap(tiny.model(name))


@cache
def rows(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two prompts of different length."""
    if name != "planted":
        return (3, 14, 15, 65, 35, 89), (38, 46, 26, 43)
    p = planted.induction()
    ids = p.tokenizer(p.clean)["input_ids"]
    return tuple(ids), tuple(ids[2:])


def changed(name: str) -> list[list[int]]:
    """The same tokens in another order: far enough from the prompts that an effect is not a ratio
    of roundings."""
    return [[*row[1:], row[0]] for row in rows(name)]


# parameter -> its value for a list of examples of a subject; what a method does not need stays at
# its default
ARGUMENTS: dict[str, Callable[[str, list[int]], Any]] = {
    "corrupt": lambda name, examples: [changed(name)[e] for e in examples],
    "answer": lambda name, examples: [[7, 8][e] for e in examples],
    "foil": lambda name, examples: [[9, 10][e] for e in examples],
    "anchors": lambda name, examples: changed(name),  # of all examples, whichever are measured
    "other": lambda name, examples: subject(name),
    "function": lambda name, examples: [
        3,
        15,
        38,
    ],  # token ids, of all examples, whichever are measured
}


def call(address: str, lm: LM, name: str, inputs: Any, examples: list[int]) -> xr.Dataset:
    """The method's result, always as a Dataset."""
    measure = catalogue.module(address).measure
    parameters = inspect.signature(measure).parameters
    if "Sequence[Sequence[int]]" in str(
        parameters["inputs"].annotation
    ):  # a list of neurons, not prompts
        inputs = UNITS
    options = {key: make(name, examples) for key, make in ARGUMENTS.items() if key in parameters}
    missing = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.name not in ("lm", "inputs", *options)
    ]
    assert not missing, f"{address} needs {missing}: say in ARGUMENTS how to give it"
    result = measure(lm, inputs, **options)
    assert isinstance(result, (xr.Dataset, xr.DataArray))
    return (
        result
        if isinstance(result, xr.Dataset)
        else result.to_dataset(name=result.name, promote_attrs=True)
    )


def padded(name: str, side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, rows(name)))
    table = torch.zeros(2, width, dtype=torch.long)
    mask = torch.zeros(2, width, dtype=torch.long)
    for example, row in enumerate(rows(name)):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        table[example, where] = torch.tensor(row)
        mask[example, where] = 1
    return {"input_ids": table, "attention_mask": mask}


@cache
def measured(address: str, name: str) -> xr.Dataset | None:
    """The result on both prompts, padded on the right; None where the method refuses this family,
    with a reason."""
    if name not in FEWER.get(address.partition(".")[0], SUBJECTS):
        SUPPORT.setdefault(address, {})[name] = "not tried here: too slow"
        return None
    try:
        result = call(address, subject(name), name, padded(name, "right"), [0, 1])
    except REFUSALS as refusal:
        if isinstance(refusal, InputError) and "nothing to restore" in str(refusal):
            raise  # these prompts were refused, not this family: give others
        if len(str(refusal).split()) < 7:
            pytest.fail(f"{address} refuses {name} without a reason: {refusal}")
        SUPPORT.setdefault(address, {})[name] = f"refused: {refusal}"
        return None
    SUPPORT.setdefault(address, {})[name] = "yes"
    return result


def runs_on(address: str) -> str | None:
    """A decoder that the method supports."""
    return next(
        (name for name in ("llama", "planted", "gpt2") if measured(address, name) is not None), None
    )


def supported(address: str, name: str) -> xr.Dataset:
    result = measured(address, name)
    if result is None:
        pytest.skip(SUPPORT[address][name])
    return result


@pytest.fixture(scope="module", autouse=True)
def _fast() -> Iterator[None]:
    """Each method's own tests run under beartype; here it would make every method ten times slower.
    And on tensors this small a second thread only waits: on a busy machine that is ten times slower
    again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _say_what_is_supported(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    writer = request.config.pluginmanager.get_plugin("terminalreporter")
    if writer and request.config.get_verbosity() > 0:
        writer.write_line("")
        for address, by_name in sorted(SUPPORT.items()):
            writer.write_line(
                f"{address:34}"
                + " ".join(n if said == "yes" else f"({n})" for n, said in by_name.items())
            )


# --- comparing results ----------------------------------------------------------------------------


def same(one: np.ndarray, two: np.ndarray, tolerance: float = TOLERANCE) -> str:
    """How two arrays differ, or ""."""
    if one.shape != two.shape:
        return f"shapes {one.shape} and {two.shape}"
    if one.dtype.kind in "OUSbiu":
        return "" if (one == two).all() else f"{one.ravel()[:4]} and {two.ravel()[:4]}"
    if (np.isnan(one) != np.isnan(two)).any():
        return "NaN in different places"
    here = np.isfinite(one)
    if not here.any():
        return ""
    gap = np.abs(one[here] - two[here])
    scale = max(float(np.abs(two[here]).max()), SMALL)
    worst = max(gap.max() / scale, np.linalg.norm(gap) / max(np.linalg.norm(two[here]), SMALL))
    return "" if worst <= tolerance else f"difference {worst:.1e}"


def everything(result: xr.Dataset) -> dict[str, xr.DataArray]:
    return {str(k): v for k, v in {**result.data_vars, **result.coords}.items()}


def cut(array: xr.DataArray, example: int, length: int) -> xr.DataArray:
    """One example's part, without padding."""
    axes = {axis: slice(0, length) for axis in TOKEN_AXES if axis in array.dims}
    return array.isel(example=example, **axes)


def differences(one: xr.Dataset, two: xr.Dataset, tolerance: float = TOLERANCE) -> list[str]:
    left, right = everything(one), everything(two)
    found = [f"only one has {key}" for key in left.keys() ^ right.keys()]
    pairs = [
        (key, same(left[key].values, right[key].values, tolerance))
        for key in left.keys() & right.keys()
    ]
    return found + [f"{key}: {said}" for key, said in pairs if said]


def alone_differences(
    together: xr.Dataset, single: xr.Dataset, example: int, length: int
) -> list[str]:
    """What differs between an example's part of a batch and the same example alone. Nulls are drawn
    for a whole batch."""
    found = []
    for key, array in everything(together).items():
        if "example" not in array.dims or key.startswith("null"):
            continue
        said = same(cut(array, example, length).values, cut(single[key], 0, length).values)
        found += [f"{key}: {said}"] if said else []
    return found


def unpadded(result: xr.Dataset, lengths: list[int]) -> list[str]:
    """Where padding holds something: numbers must be NaN, ids -1, truth False, text empty."""
    found = []
    for key, array in everything(result).items():
        for axis in [a for a in TOKEN_AXES if a in array.dims and "example" in array.dims]:
            for example, length in enumerate(lengths):
                rest = array.isel(example=example, **{axis: slice(length, None)}).values
                if rest.dtype.kind == "f":
                    bad = ~np.isnan(rest)
                elif rest.dtype.kind == "O":
                    bad = rest != ""
                else:
                    bad = rest != (-1 if rest.dtype.kind == "i" else 0)
                found += [f"{key} along {axis}"] if bad.any() else []
    return found


def fingerprint(lm: LM) -> dict[str, Any]:
    modules = list(lm.model.named_modules())
    return {
        "weights": {k: v.clone() for k, v in lm.model.state_dict().items()},
        "flags": {k: (p.requires_grad, p.grad is None) for k, p in lm.model.named_parameters()},
        "training": {k: m.training for k, m in modules},
        "hooks": {
            k: (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
            for k, m in modules
        },
        "configs": [(c.to_dict(), c._attn_implementation_internal) for c in configs_of(lm.model)],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "taps": len(lm.taps.listening),
    }


def touched(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
        return a == b

    return [key for key in before if not equal(before[key], after[key])]


# --- measure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("address", MEASURES)
def test_a_result_is_whole_labelled_and_kept(address: str, name: str, tmp_path: Path) -> None:
    result = supported(address, name)
    assert result.data_vars
    for key, array in everything(result).items():
        assert set(map(str, array.dims)) <= set(words_of.words(address)), key
        assert array.dtype.kind in "fiubO", key
    numbers = [a for a in result.data_vars.values() if a.dtype.kind == "f"]
    assert not numbers or any(np.isfinite(a.values).any() for a in numbers)
    assert unpadded(result, [len(row) for row in rows(name)]) == []
    assert result.attrs["method"] == address
    said = json.loads(result.attrs["provenance"])
    assert said == json.loads(json.dumps(subject(name).provenance))
    assert isinstance(json.loads(result.attrs["settings"]), dict)
    if "seed" in inspect.signature(catalogue.module(address).measure).parameters:
        assert result.attrs["seed"] == 0
    save(result, tmp_path / "result.nc")
    xr.testing.assert_identical(load(tmp_path / "result.nc"), result)


# what is known to break a law, and why; each entry must fail, so that it goes when the method is
# put right
@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("address", MEASURES)
def test_batched_equals_single_and_left_equals_right(address: str, name: str) -> None:
    result, lm = supported(address, name), subject(name)
    before = fingerprint(lm)
    left = call(address, lm, name, padded(name, "left"), [0, 1])
    assert touched(before, fingerprint(lm)) == []
    assert differences(result, left, 1e-6) == []
    for example, row in enumerate(rows(name)):
        if any("example" in array.dims for array in result.data_vars.values()):
            single = call(address, lm, name, [list(row)], [example])
            assert alone_differences(result, single, example, len(row)) == []


@pytest.mark.parametrize("address", MEASURES)
def test_the_same_seed_gives_the_same_result_in_any_mode(address: str) -> None:
    """On a model in training mode with dropout, with other numbers drawn in between."""
    result, lm = supported(address, "gpt2"), subject("gpt2")
    torch.manual_seed(123)
    lm.model.train()
    before = fingerprint(lm)
    again = call(address, lm, "gpt2", padded("gpt2", "right"), [0, 1])
    assert touched(before, fingerprint(lm)) == []
    lm.model.eval()
    assert differences(result, again, 0.0) == []


@pytest.mark.parametrize("address", MEASURES)
def test_every_method_runs_on_some_decoder(address: str) -> None:
    assert runs_on(address) is not None, SUPPORT[address]


@pytest.mark.parametrize("address", MEASURES)
def test_a_method_that_breaks_half_way_leaves_the_model_as_it_was(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = runs_on(address) or "llama"
    lm = subject(name)
    [module] = lm.layout.writers(lm.layout.resolve_one("layers.1.mlp.out"))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    before = fingerprint(lm)
    with monkeypatch.context() as patch:
        patch.setattr(module, "forward", fail)
        try:
            call(address, lm, name, padded(name, "right"), [0, 1])
        except KeyboardInterrupt:
            pass
        else:
            assert address in ("neurons.vocabulary", "neurons.parametric_trace"), (
                f"{address} never ran the model"
            )
    assert touched(before, fingerprint(lm)) == []


# --- edit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("address", EDITS)
def test_an_edit_changes_outputs_inside_and_not_a_bit_afterwards(
    address: str, name: str, tmp_path: Path
) -> None:
    lm = subject(name)
    logits = lambda: lm(padded(name, "right"))["logits"].detach().clone()  # noqa: E731
    before, plain = fingerprint(lm), logits()
    try:
        made = catalogue.module(address).edit(lm, UNITS)
    except REFUSALS as refusal:
        SUPPORT.setdefault(address, {})[name] = f"refused: {refusal}"
        pytest.skip(str(refusal))
    SUPPORT.setdefault(address, {})[name] = "yes"
    assert touched(before, fingerprint(lm)) == []
    with made:
        inside = logits()
    assert not torch.equal(inside, plain)
    assert touched(before, fingerprint(lm)) == []
    assert torch.equal(logits(), plain)
    with pytest.raises(KeyboardInterrupt), made:
        raise KeyboardInterrupt
    assert touched(before, fingerprint(lm)) == []
    if isinstance(made, Edit):
        made.save(tmp_path / "edit.safetensors")
        with Edit.load(lm, tmp_path / "edit.safetensors"):
            assert torch.equal(logits(), inside)


# --- what a file says -----------------------------------------------------------------------------


@pytest.mark.parametrize("entry", catalogue.methods(), ids=lambda e: e.address)
def test_a_method_file_says_what_it_is(entry: catalogue.Entry) -> None:
    text = catalogue.docstring(entry.path.read_text("utf-8"))
    first = " ".join(text.partition("\n\n")[0].split())
    assert first.endswith("."), "the first paragraph is one sentence"
    assert ". " not in first
    assert re.search(r"^Paper: \S", text, re.MULTILINE)
    assert entry.paper
    flat = " ".join(text.split())
    assert "Reads as" in flat
    assert "oes not show" in flat


@pytest.mark.parametrize("entry", catalogue.methods(), ids=lambda e: e.address)
def test_options_are_named_few_and_have_defaults_or_are_known(entry: catalogue.Entry) -> None:
    for verb in entry.verbs:
        function = getattr(catalogue.module(entry.address), verb)
        parameters = list(inspect.signature(function).parameters.values())
        fixed = {
            "measure": ["lm", "inputs"],
            "fit": ["lm", "inputs"],
            "edit": ["lm", "request"],
            "build": ["config"],
        }[verb]
        assert [p.name for p in parameters[: len(fixed)]] == fixed
        options = parameters[len(fixed) :]
        assert all(p.kind is p.KEYWORD_ONLY for p in options)
        assert len(options) <= 8
        assert inspect.getdoc(function)


# --- the suite itself can fail --------------------------------------------------------------------


def test_planted_faults_are_seen() -> None:
    values = np.arange(12.0).reshape(2, 6)
    right = xr.Dataset(
        {
            "x": (
                ("example", "position"),
                np.where([[True] * 6, [True] * 4 + [False] * 2], values, np.nan),
            )
        }
    )
    assert unpadded(right, [6, 4]) == []
    assert unpadded(xr.Dataset({"x": (("example", "position"), values)}), [6, 4]) == [
        "x along position"
    ]
    assert unpadded(xr.Dataset({"x": (("example", "position"), values.astype(int))}), [6, 4]) == [
        "x along position"
    ]
    text = xr.Dataset(
        {"t": (("example", "position"), np.array([["a"] * 6, ["b"] * 6], dtype=object))}
    )
    assert unpadded(text, [6, 4]) == ["t along position"]
    assert differences(right, right) == []
    assert differences(right, right * 1.001) == ["x: difference 1.0e-03"]
    assert differences(right, right + 1e-4) == []
    assert differences(right, right.isel(position=slice(0, 5)))[0].startswith("x: shapes")
    assert differences(right, right.fillna(0.0)) == ["x: NaN in different places"]
    single = right.isel(example=[1], position=slice(0, 4))
    assert alone_differences(right, single, 1, 4) == []
    assert alone_differences(right, single + 0.01, 1, 4) != []
    lm = wrap(tiny.model("gpt2"))
    before = fingerprint(lm)
    lm.model.transformer.h[0].mlp.c_fc.bias.data[0] += 1e-6
    torch.rand(1)
    assert touched(before, fingerprint(lm)) == ["weights", "torch"]


def test_every_method_is_here() -> None:
    assert {entry.address for entry in catalogue.methods()} >= {*MEASURES, *EDITS}
    assert len(MEASURES) >= 3
