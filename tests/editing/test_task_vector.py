"""A vector is the difference of two models, sums of such are sums, negated it takes an ability
away, and of an adapter it is what its layers apply."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stratoscope.editing import task_vector
from stratoscope.engine.metric import last_logits
from stratoscope.errors import FamilyError, InputError, ResultError
from stratoscope.models import LM, wrap
from support import tiny
from support.merging import FIRST, SECOND, moved, saved, share, taught, tensors, three
from support.subjects import ROWS, close, untouched

EXAMPLE = {"edit": lambda case: {"request": moved(case.lm, 1), "scale": 0.7}}
Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def models() -> tuple[LM, LM, LM]:
    return three()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(wrap(tiny.model("llama")), tmp_path_factory.mktemp("llama") / "base")


@torch.no_grad()
def logits(lm: LM) -> Tensor:
    return lm([ROWS[0]])["logits"][0]


# --- what it is and what it does ------------------------------------------------------------------


def test_sums_are_those_of_state_dicts(models: tuple[LM, LM, LM]) -> None:
    base, first, second = models
    third = moved(base, 5)
    a, b, c = (task_vector.between(base, one) for one in (first, second.model, third))
    made = {"sum": a + b, "negated": -a, "scaled": 0.5 * a, "over": a / 4.0, "analogy": c + (b - a)}
    start = base.model.state_dict()
    x, y, z = (one.state_dict() for one in (first.model, second.model, third))
    for name in a.shapes:
        one, two, three_ = x[name] - start[name], y[name] - start[name], z[name] - start[name]
        close(made["sum"][name], one + two, 1e-6)
        close(made["negated"][name], -one, 1e-6)
        close(made["scaled"][name], one / 2, 1e-6)
        close(made["over"][name], one / 4, 1e-6)
        close(made["analogy"][name], three_ + two - one, 1e-6)
    assert "lm_head.weight" not in a.shapes  # it is the embedding


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_added_once_it_is_the_trained_model_and_added_never_the_base(name: str) -> None:
    lm = wrap(tiny.model(name))
    fine = wrap(moved(lm, 3))
    plain, expected = logits(lm), logits(fine)
    with untouched(lm), task_vector.edit(lm, fine):
        close(logits(lm), expected, 1e-5)
    with task_vector.edit(lm, fine, scale=0.0):
        assert torch.equal(logits(lm), plain)
    with task_vector.edit(lm, [fine, task_vector.between(fine, lm)]):
        close(logits(lm), plain, 1e-5)


def test_negated_it_takes_one_ability_and_leaves_the_other() -> None:
    """A model that does both is taught one of them further: less of that step is less of it."""
    able = wrap(taught(tiny.model("smollm2"), FIRST, SECOND, steps=14).eval())
    fine = taught(able.model, FIRST, steps=8)
    assert [share(able.model, pair) for pair in (FIRST, SECOND)] == [1.0, 1.0]
    with untouched(able), task_vector.edit(able, fine, scale=-2.0):
        assert [share(able.model, pair) for pair in (FIRST, SECOND)] == [0.0, 1.0]


def test_an_analogy_carries_an_ability_over(models: tuple[LM, LM, LM]) -> None:
    """What the first task's training is to the base, added to a model with the second."""
    base, first, second = models
    tau = task_vector.between(base, second) + task_vector.between(base, first)
    with task_vector.edit(base, tau):
        assert [share(base.model, pair) for pair in (FIRST, SECOND)] == [1.0, 1.0]


def test_a_vector_stays_when_its_model_goes_on_and_inside_its_own_edit(
    models: tuple[LM, LM, LM],
) -> None:
    base, first, _ = models
    fine = deepcopy(first.model)
    tau = task_vector.between(base, fine)
    before = {name: tau[name].clone() for name in tau.shapes}
    with torch.no_grad():
        for value in fine.parameters():
            value.zero_()
    with task_vector.edit(base, tau):
        assert all(torch.equal(tau[name], x) for name, x in before.items())


def test_folders_give_the_same_and_are_read_when_asked(
    models: tuple[LM, LM, LM], tmp_path: Path
) -> None:
    base, first, _ = models
    places = [saved(lm, tmp_path / name) for lm, name in ((base, "base"), (first, "first"))]
    held, files = task_vector.between(base, first), task_vector.between(*places)
    assert held.shapes == files.shapes
    assert all(torch.equal(held[name], files[name]) for name in held.shapes)
    out = task_vector.write(places[0], -2.0 * files, tmp_path / "out", scale=0.5)
    again = task_vector.write(base, -2.0 * held, tmp_path / "again", scale=0.5)
    start, other = tensors(places[0]), tensors(again)
    for name, x in tensors(out).items():
        assert torch.equal(x, other[name])
        close(x, start[name] - held[name], 1e-6)
    with pytest.raises(ResultError, match="is there already"):
        task_vector.write(base, held, out)


def test_norms_and_cosines_by_tensor_block_and_whole(models: tuple[LM, LM, LM]) -> None:
    base, first, second = models
    a, b = (task_vector.between(base, one) for one in (first, second))
    found = task_vector.compare({"one": a, "two": b, "none": 0.0 * a})
    flat = {n: [tau[n].flatten().double().numpy() for tau in (a, b)] for n in a.shapes}
    for number, name in enumerate(found.tensor.values):
        x, y = flat[str(name)]
        close(found.norm[:2, number], [np.linalg.norm(x), np.linalg.norm(y)], 1e-9)
        if np.linalg.norm(x) and np.linalg.norm(y):
            cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
            assert float(found.cosine[0, 1, number]) == pytest.approx(cosine, abs=1e-9)
    blocks = [f"model.layers.{n}" for n in range(3)]
    assert set(found.block.values) == {"rest", *blocks}
    for name in blocks:
        x, y = (np.concatenate([v[t] for n, v in flat.items() if f"{name}." in n]) for t in (0, 1))
        cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        at = found.sel(block=name)
        assert float(at.block_cosine[1, 0]) == pytest.approx(cosine, abs=1e-9)
        assert float(at.block_norm[1]) == pytest.approx(np.linalg.norm(y))
    x, y = (np.concatenate([v[t] for v in flat.values()]) for t in (0, 1))
    assert float(found.total_cosine[0, 1]) == pytest.approx(
        x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    )
    assert np.allclose(found.total_cosine.values.diagonal()[:2], 1)
    assert np.isnan(found.total_cosine[2, 0])
    assert float(found.total_norm[2]) == 0


# --- adapters in memory ---------------------------------------------------------------------------


class Low(nn.Module):
    """Two small matrices beside a frozen layer, with dropout; with a magnitude it is DoRA."""

    def __init__(self, layer: Any, *, magnitude: bool = False, bias: bool = False) -> None:
        super().__init__()
        out, into = layer.weight.shape
        if isinstance(layer, Conv1D | nn.Embedding):
            out, into = into, out
        self.base_layer, self.in_features, self.out_features = layer, into, out
        generator = torch.Generator().manual_seed(out)
        self.down = nn.Parameter(torch.randn(2, into, generator=generator) / into)
        self.up = nn.Parameter(torch.randn(out, 2, generator=generator))
        self.magnitude = nn.Parameter(torch.rand(out) + 0.5) if magnitude else None
        self.more = nn.Parameter(torch.ones(out)) if bias else None
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        low = self.down.T[x] if x.dtype == torch.long else self.dropout(x) @ self.down.T
        found = self.base_layer(x) + low @ self.up.T
        found = found if self.magnitude is None else found * self.magnitude
        return found if self.more is None else found + self.more


def adapted(name: str, *paths: str, **options: Any) -> tuple[LM, Any]:
    model = tiny.model(name).eval()
    lm, twin = wrap(model), deepcopy(model)
    for path in paths:
        above, _, last = path.rpartition(".")
        setattr(twin.get_submodule(above), last, Low(twin.get_submodule(path), **options))
    return lm, twin.eval()


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("llama", (Q, UP, "model.embed_tokens")),
        ("gpt2", ("transformer.h.1.attn.c_attn", "transformer.h.0.mlp.c_proj")),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_is_what_its_layers_apply(
    name: str, paths: tuple[str, ...], training: bool
) -> None:
    lm, fine = adapted(name, *paths)
    with torch.no_grad():
        expected = fine(torch.tensor([ROWS[0]])).logits[0]
    state = torch.get_rng_state()
    tau = task_vector.between(lm, fine.train(training))
    assert torch.equal(state, torch.get_rng_state())
    assert fine.training == training
    for path in paths:
        low = fine.get_submodule(path)
        product = low.up @ low.down
        turned = isinstance(low.base_layer, Conv1D | nn.Embedding)
        close(tau[f"{path}.weight"], (product.T if turned else product).detach(), 1e-6)
    moved_ = {name for name in tau.shapes if bool(tau[name].any())}
    assert moved_ == {f"{path}.weight" for path in paths}
    with untouched(lm), task_vector.edit(lm, tau):
        close(logits(lm), expected, 1e-5)


def test_a_scaled_adapter_and_one_inside_an_lm() -> None:
    """DoRA is no product of two matrices: it is asked what it applies. What was trained beside
    adapters counts too."""
    lm, fine = adapted("llama", Q, UP, magnitude=True)
    with torch.no_grad():
        fine.model.norm.weight.mul_(1.5)
        expected = fine(torch.tensor([ROWS[0]])).logits[0]
    with task_vector.edit(lm, wrap(fine)):
        close(logits(lm), expected, 1e-5)


def test_small_changes_of_half_precision_weights_are_not_lost() -> None:
    lm, fine = adapted("llama", Q)
    low = fine.get_submodule(Q)
    with torch.no_grad():
        low.up.mul_(1e-3)
    half = wrap(deepcopy(lm.model).bfloat16())
    tau = task_vector.between(half, fine.bfloat16())
    product = (low.up.float() @ low.down.float()).detach()
    assert float((tau[f"{Q}.weight"] - product).norm() / product.norm()) < 1e-3


def test_adapters_that_are_refused() -> None:
    lm, fine = adapted("llama", Q, bias=True)
    with pytest.raises(InputError, match=rf"adapter at `{Q}.weight` adds a bias"):
        task_vector.between(lm, fine)
    with pytest.raises(InputError, match="the base has adapters inside"):
        task_vector.between(fine, lm)
    _, other = adapted("gpt2", "transformer.h.1.attn.c_attn")
    with pytest.raises(InputError, match=r"has an adapter at `transformer\.h\.1\.attn\.c_attn"):
        task_vector.between(lm, other)
    tied, head = adapted("smollm2", "lm_head")
    with pytest.raises(InputError, match=r"`lm_head\.weight`, which is tied to `model\.embed"):
        task_vector.between(tied, head)
    _, alone = adapted("smollm2", Q)
    alone.lm_head.weight = nn.Parameter(alone.lm_head.weight.detach() + 1)
    with pytest.raises(InputError, match=r"`lm_head\.weight`, which is tied to `model\.embed"):
        task_vector.between(tied, alone)
    curved = deepcopy(lm.model)
    curved.model.layers[0].mlp.up_proj = low = Low(curved.model.layers[0].mlp.up_proj)
    low.forward = lambda x: low.base_layer(x).relu()  # type: ignore[method-assign]
    with pytest.raises(FamilyError, match="is not linear in its input"):
        task_vector.between(lm, curved)


# --- adapters in folders --------------------------------------------------------------------------

R, ALPHA = 2, 6


def lora(place: Path, halves: dict[str, tuple[int, int]], **options: Any) -> dict[str, Tensor]:
    """A folder as PEFT writes it: (in, out) of each layer by its path."""
    generator, held = torch.Generator().manual_seed(0), {}
    for path, (into, out) in halves.items():
        kind = "lora_embedding_" if "embed" in path else "lora_"
        end = "" if "embed" in path else ".weight"
        for side, shape in (("A", (R, into)), ("B", (out, R))):
            held[f"base_model.model.{path}.{kind}{side}{end}"] = torch.randn(
                shape, generator=generator
            )
    held |= options.pop("beside", {})
    place.mkdir()
    save_file(held, place / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj"],
              "base_model_name_or_path": "someone/base"}  # fmt: skip
    (place / "adapter_config.json").write_text(json.dumps(config | options))
    return held


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, ALPHA / R),
        ({"use_rslora": True}, ALPHA / R**0.5),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 10}}, 10 / R),
        ({"alpha_pattern": {"k_proj": 10}}, ALPHA / R),
    ],
)
def test_a_folder_of_lora_is_alpha_over_rank_b_a(
    base: Path, tmp_path: Path, options: dict[str, Any], scale: float
) -> None:
    norm = torch.full((32,), 1.25)
    held = lora(
        tmp_path / "lora", {Q: (32, 32), "model.embed_tokens": (96, 32)},
        beside={"base_model.model.model.norm.weight": norm}, **options,
    )  # fmt: skip
    tau = task_vector.between(base, tmp_path / "lora")
    a, b = (held[f"base_model.model.{Q}.lora_{side}.weight"] for side in "AB")
    close(tau[f"{Q}.weight"], scale * (b @ a), 1e-6)
    a, b = (held[f"base_model.model.model.embed_tokens.lora_embedding_{side}"] for side in "AB")
    factor = ALPHA / (R**0.5 if "use_rslora" in options else R)
    close(tau["model.embed_tokens.weight"], factor * (b @ a).T, 1e-6)
    close(tau["model.norm.weight"], norm - tensors(base)["model.norm.weight"], 1e-6)
    assert not bool(tau[f"{UP}.weight"].any())
    out = task_vector.write(base, tmp_path / "lora", tmp_path / "out")
    start = tensors(base)
    for name, x in tensors(out).items():
        close(x, start[name] + tau[name], 1e-6)


def test_an_embedding_that_was_saved_beside_its_adapter_counts_once(
    base: Path, tmp_path: Path
) -> None:
    name = "model.embed_tokens"
    own = tensors(base)[f"{name}.weight"]
    beside = {f"base_model.model.{name}.base_layer.weight": own + 0.5}
    held = lora(tmp_path / "lora", {name: (96, 32)}, beside=beside)
    a, b = (held[f"base_model.model.{name}.lora_embedding_{side}"] for side in "AB")
    tau = task_vector.between(base, tmp_path / "lora")
    close(tau[f"{name}.weight"], ALPHA / R * (b @ a).T + 0.5, 1e-6)


def test_a_folder_for_conv1d_is_turned(tmp_path: Path) -> None:
    path = "transformer.h.1.attn.c_attn"
    held = lora(tmp_path / "lora", {path: (32, 96)}, fan_in_fan_out=True)
    tau = task_vector.between(wrap(tiny.model("gpt2")), tmp_path / "lora")
    a, b = (held[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
    close(tau[f"{path}.weight"], ALPHA / R * (b @ a).T, 1e-6)


def test_folders_that_are_refused(base: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, tuple[int, int]], dict[str, Any], str]] = [
        ({Q: (32, 40)}, {}, rf"of someone/base: it changes `{Q}.weight` \(40, 32\), which is"),
        ({"model.layers.7.self_attn.q_proj": (32, 32)}, {}, r"which is absent in .*base"),
        ({Q: (32, 32)}, {"use_dora": True}, "has use_dora: what it adds is not in its file"),
        ({Q: (32, 32)}, {"peft_type": "IA3"}, "has peft_type IA3"),
        ({Q: (32, 32)}, {"init_lora_weights": "pissa"}, "has init_lora_weights pissa"),
        ({}, {"beside": {f"base_model.model.{Q}.lora_A.weight": torch.ones(R, 32)}},
         rf"`{Q}` of .* is no pair of matrices"),
        ({}, {"beside": {"base_model.model.odd": torch.ones(2)}}, r"it changes `odd` \(2,\)"),
    ]  # fmt: skip
    lora(tmp_path / "head", {"lm_head": (32, 96)})
    with pytest.raises(InputError, match=r"head changes `lm_head\.weight`, which is tied to"):
        task_vector.between(wrap(tiny.model("smollm2")), tmp_path / "head")
    for number, (halves, options, said) in enumerate(cases):
        place = tmp_path / str(number)
        lora(place, halves, **options)
        with pytest.raises(InputError, match=said):
            task_vector.between(base, place)


# --- what is refused ------------------------------------------------------------------------------


def test_vectors_of_other_models_and_scales_that_are_no_numbers(
    models: tuple[LM, LM, LM], base: Path
) -> None:
    lm, first, _ = models
    tau = task_vector.between(lm, first)
    other = task_vector.between(base, base)
    with pytest.raises(InputError, match=r"`lm_head.weight` is absent in one and \(96, 32\)"):
        _ = tau + other
    with untouched(lm), pytest.raises(InputError, match=r"of another model: `lm_head.weight`"):
        task_vector.edit(lm, other)
    for scale in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="give a number and a vector"):
            task_vector.edit(lm, tau, scale=scale)
    with pytest.raises(InputError, match="give a number and a vector"):
        task_vector.edit(lm, [])
    with pytest.raises(InputError, match="there is no task vector to compare"):
        task_vector.compare({})
    assert last_logits(lm, ROWS).isfinite().all()
