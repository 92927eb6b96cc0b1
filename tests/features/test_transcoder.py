"""A transcoder of an MLP's own neurons is the MLP; one that is fitted finds planted neurons, its
splice keeps the error, and it is kept as SAELens keeps one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stratoscope.engine.dictionary import Dictionary
from stratoscope.engine.generate import generate
from stratoscope.engine.harvest import harvest
from stratoscope.engine.intervene import ablate, intervene
from stratoscope.engine.sparse import learn
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.features import examples, fidelity, splice, transcoder
from stratoscope.models import LM
from support.cases import Case
from support.subjects import ROWS, lm_of, padded, untouched

RNG = torch.Generator().manual_seed(2)
TEXTS = [torch.randint(3, 96, (40,), generator=RNG).tolist() for _ in range(60)]
LAYER, OUT = 1, "layers.1.mlp.out"


def _rows(case: Case) -> list[list[int]]:
    """Words alone: a picture's places are no text to harvest."""
    return [row[5:] if case.name == "llava" else row for row in case.rows] * 3


EXAMPLE = {
    "fit": lambda case: {
        "inputs": _rows(case), "layer": 0, "tokens": 18, "width": 8, "sparsity": 2, "steps": 4,
        "batch_size": 6,
    }
}  # fmt: skip


def own(lm: LM, layer: int, **change: Any) -> Dictionary:
    """An OPT's MLP, neuron by neuron, as it reads the normed stream."""
    block = lm.model.model.decoder.layers[layer]
    made = {
        "W_enc": block.fc1.weight.detach().T.contiguous(),
        "b_enc": block.fc1.bias.detach(),
        "W_dec": block.fc2.weight.detach().T.contiguous(),
        "b_dec": torch.zeros(block.fc1.in_features),
        "b_dec_out": block.fc2.bias.detach(),
    }
    sites = {"site_in": f"layers.{layer}.mlp.in", "site_out": f"layers.{layer}.mlp.out"}
    return Dictionary(**made | sites | change)


@torch.no_grad()
def logits(lm: LM) -> Tensor:
    found = lm(padded(ROWS, "left")).logits
    return torch.cat([found[n, : len(row)] for n, row in enumerate(ROWS)])


def gap(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


def test_an_mlp_s_own_neurons_are_it() -> None:
    lm = lm_of("opt")
    made = [own(lm, layer) for layer in range(3)]
    plain, words = logits(lm), generate(lm, ROWS, tokens=4)
    with untouched(lm), splice.edit(lm, made, error="drop"):
        assert gap(logits(lm), plain) <= 1e-5
        again = generate(lm, ROWS, tokens=4)
    assert all(torch.equal(a, b) for a, b in zip(again, words))
    found = fidelity.measure(lm, ROWS, dictionary=made[1])
    assert float(found.fvu.max()) < 1e-8
    act = capture(lm, ROWS, "layers.1.mlp.act")["layers.1.mlp.act"]
    neuron = int(act[0].sum(dim=0).argmax())
    with intervene(lm, ablate("layers.1.mlp.act", units=[neuron])):
        expected = logits(lm)
    assert gap(expected, plain) > 1e-4
    for error in ("keep", "drop"):
        with splice.edit(lm, made[1], error=error, off=[neuron]):
            assert gap(logits(lm), expected) <= 1e-5
    top = examples.measure(lm, ROWS, dictionary=made[1], units=[neuron], top=1)
    real = torch.cat([act[n, : len(row), neuron] for n, row in enumerate(ROWS)])
    assert float(top.activation[0, 0]) == pytest.approx(float(real.max()), abs=1e-5)


def test_the_error_is_kept_and_the_mean_alone_is_mean_ablation() -> None:
    lm = lm_of("opt")
    mean = capture(lm, ROWS, OUT).mean(OUT)
    empty = own(lm, 1, W_dec=torch.zeros(48, 32), b_dec_out=mean)
    with intervene(lm, ablate(OUT, "mean", reference=mean)):
        expected = logits(lm)
    with splice.edit(lm, empty, error="drop"):
        assert torch.equal(logits(lm), expected)
    wrong, plain = own(lm, 1, b_dec_out=torch.ones(32)), logits(lm)
    silent = int((wrong.encode(capture(lm, ROWS, OUT)[OUT]) > 0).sum((0, 1)).argmin())
    with splice.edit(lm, wrong):
        assert torch.equal(logits(lm), plain)
    with splice.edit(lm, wrong, off=[silent]):
        assert gap(logits(lm), plain) < gap(expected, plain)
    with splice.edit(lm, wrong, error="drop"):
        assert gap(logits(lm), plain) > 0.01


def test_it_is_the_harvest_learnt_from_and_says_more_after_more_steps() -> None:
    lm, seen = lm_of("llama"), []
    more: dict[str, Any] = {"sparsity": 6, "batch_size": 128, "seed": 3}
    for steps in (1, 200):
        with untouched(lm):
            made = transcoder.fit(
                lm, TEXTS[:25], layer=1, tokens=900, width=64, steps=steps, **more
            )
        seen.append(fidelity.measure(lm, TEXTS[25:30], dictionary=made, reference=TEXTS[:25]))
    kept = harvest(lm, TEXTS[:25], ["layers.1.mlp.in", OUT], tokens=900, seed=3)
    x, y = kept["layers.1.mlp.in"], kept[OUT]
    sites = {"site_in": "layers.1.mlp.in", "site_out": OUT}
    again = learn(x, y, width=64, kind="topk", steps=200, **more, **sites)
    assert all(torch.equal(v, again.parts()[0][name]) for name, v in made.parts()[0].items())
    assert (made.site_in, made.site_out) == ("layers.1.mlp.in", OUT)
    before, after = (float(one.fvu.mean()) for one in seen)
    assert after < 0.7 * before


def test_a_folder_is_kept_as_saelens_keeps_a_transcoder(tmp_path: Path) -> None:
    lm = lm_of("gpt2")
    more: dict[str, Any] = {"layer": 1, "tokens": 200, "width": 16, "batch_size": 50, "steps": 4}
    made = transcoder.fit(lm, TEXTS, kind="jumprelu", folder=tmp_path, **more)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu_transcoder"
    assert (config["d_in"], config["d_out"], config["d_sae"]) == (32, 32, 16)
    assert config["metadata"]["hook_name"] == "blocks.1.mlp.hook_in"
    assert config["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"
    again = transcoder.fit(lm, [[5]], kind="jumprelu", folder=tmp_path, **more)  # nothing is run
    x = torch.randn(9, 32, generator=RNG)
    assert torch.allclose(made.encode(x), again.encode(x), atol=1e-5)
    config["metadata"] |= {"site_in": "", "site_out": ""}  # as SAELens alone would write it
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert Dictionary.load(tmp_path).site_in == "layers.1.mlp.in"


def test_what_cannot_be_fitted_is_refused() -> None:
    lm = lm_of("llama")
    with pytest.raises(SiteError, match="layer 9"):
        transcoder.fit(lm, TEXTS, layer=9)
    with pytest.raises(InputError, match="have 2,400"):
        transcoder.fit(lm, TEXTS, layer=1, tokens=2401)
    with pytest.raises(SiteError, match="expert"):
        transcoder.fit(lm_of("mixtral"), TEXTS, layer=0)
    with pytest.raises(InputError, match=r"16 numbers a token at `layers.1.mlp.in`.*has 32"):
        splice.edit(lm, own(lm_of("opt"), 1, W_enc=torch.ones(16, 48), b_dec=torch.ones(16)))
