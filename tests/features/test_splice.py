"""A splice of an MLP's own neurons changes nothing; one without weights is mean ablation; kept, the
error stays to the bit; a neuron switched off is the neuron ablated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stratoscope.engine.dictionary import Dictionary
from stratoscope.engine.generate import generate
from stratoscope.engine.intervene import ablate, intervene
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, LoadError
from stratoscope.features import splice
from stratoscope.models import LM
from support.dictionaries import drawn, neurons
from support.subjects import ROWS, lm_of, padded, untouched

SITE = "layers.1.resid_post"
EXAMPLE = {
    "edit": lambda case: {"request": [drawn(case.lm.dims.dim, "layers.0.mlp.out")], "set": {1: 4.0}}
}


@torch.no_grad()
def logits(lm: LM) -> Tensor:
    return lm(padded(ROWS, "left")).logits.clone()


def near(one: Tensor, two: Tensor, gap: float = 1e-5) -> bool:
    real = [one[n, : len(row)] - two[n, : len(row)] for n, row in enumerate(ROWS)]
    return all(float(x.abs().max()) <= gap for x in real)


def test_an_mlp_s_own_neurons_are_it() -> None:
    lm = lm_of("opt")
    made = [neurons(lm, layer) for layer in range(3)]
    seen = capture(lm, ROWS, made[1].site_in, made[1].site_out)
    gap = made[1](seen[made[1].site_in]) - seen[made[1].site_out]
    assert float(gap.abs().max()) <= 1e-5
    plain = logits(lm)
    with untouched(lm), splice.edit(lm, made, error="drop"):
        inside = logits(lm)
    assert near(inside, plain)
    active = int(capture(lm, ROWS, "layers.1.mlp.act")["layers.1.mlp.act"][0].sum(0).argmax())
    with intervene(lm, ablate("layers.1.mlp.act", units=[active])):
        expected = logits(lm)
    assert not near(expected, plain, 1e-4)
    for error in ("keep", "drop"):
        with splice.edit(lm, made, error=error, off=[(1, active)]):
            assert near(logits(lm), expected)


def test_a_dictionary_that_says_the_mean_alone_is_mean_ablation() -> None:
    lm, site = lm_of("llama"), "layers.1.mlp.out"
    mean = capture(lm, ROWS, site).mean(site)
    empty = Dictionary(
        W_enc=torch.ones(32, 3), b_enc=torch.zeros(3), W_dec=torch.zeros(3, 32), b_dec=mean,
        site_in=site,
    )  # fmt: skip
    with intervene(lm, ablate(site, "mean", reference=mean)):
        expected = logits(lm)
    with splice.edit(lm, empty, error="drop"):
        assert torch.equal(logits(lm), expected)


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu", "gated"])
def test_a_change_of_nothing_changes_nothing(kind: Any) -> None:
    lm = lm_of("llama")
    made = drawn(32, SITE, kind=kind)
    plain = logits(lm)
    with splice.edit(lm, made):
        assert torch.equal(logits(lm), plain)
    features = made.encode(capture(lm, ROWS, SITE)[SITE])
    real = torch.cat([features[n, : len(row)] for n, row in enumerate(ROWS)])
    silent = drawn(32, SITE, kind="relu", b_enc=torch.full((24,), -99.0))
    with splice.edit(lm, silent, off=list(range(24))):
        assert torch.equal(logits(lm), plain)
    loud = int(real.sum(dim=0).argmax())
    with splice.edit(lm, made, off=[loud]):
        assert not near(logits(lm), plain, 1e-3)


@pytest.mark.parametrize("normal", ["none", "layer_norm"])
def test_kept_it_adds_what_the_changed_features_write(normal: Any) -> None:
    """By a plain hook on the layer, features put there by hand."""
    lm, made = lm_of("llama"), drawn(32, SITE, normalise=normal)

    def hook(module: Any, args: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        z = made.encode(x)
        new = z.clone()
        new[..., 3], new[..., 5] = 0.0, 2.5
        y = x + made.decode(new, x) - made.decode(z, x)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    handle = lm.model.model.layers[1].register_forward_hook(hook)
    expected = logits(lm)
    handle.remove()
    with splice.edit(lm, [made], off=[3], set={5: 2.5}):
        assert near(logits(lm), expected)


def test_a_transcoder_reads_what_the_model_goes_on_with() -> None:
    """Also under a change made inside the block, and while generating with a cache."""
    lm = lm_of("opt")
    made = neurons(lm, 1)
    change = ablate(made.site_in, units=[1, 2, 3])
    with intervene(lm, change):
        expected, words = logits(lm), generate(lm, ROWS, tokens=4)
    with splice.edit(lm, made, error="drop"), intervene(lm, change):
        assert near(logits(lm), expected)
        assert all(torch.equal(a, b) for a, b in zip(generate(lm, ROWS, tokens=4), words))
    backwards = drawn(32, "layers.2.mlp.out", site_out="layers.0.mlp.out")
    with (
        untouched(lm),
        splice.edit(lm, backwards, error="drop"),
        pytest.raises(InputError, match="computes first"),
    ):
        logits(lm)


def test_it_is_kept_in_a_file_and_says_what_it_is(tmp_path: Path) -> None:
    lm, made = lm_of("gpt2"), drawn(32, "layers.1.mlp.out", kind="jumprelu")
    folder = made.save(tmp_path / "dictionary")
    first = splice.edit(lm, [str(folder)], set={2: 1.5}, error="drop")
    first.save(tmp_path / "edit")
    with first:
        inside = logits(lm)
        assert "2=1.5" in str(lm.provenance["changes"])
    with splice.Splice.load(lm, tmp_path / "edit"):
        assert torch.equal(logits(lm), inside)
    with pytest.raises(InputError, match=r"16 numbers a token at `layers.1.resid_post`.*has 32"):
        splice.edit(lm, drawn(16, SITE))
    with pytest.raises(LoadError, match="splice"):
        splice.Splice.load(lm, folder / "sae_weights.safetensors")


def test_what_is_no_feature_is_refused() -> None:
    lm, made = lm_of("llama"), drawn(32, SITE)
    for given, more, said in (
        ([], {}, "at least one dictionary"),
        ([made], {"off": [24]}, "feature 24 of dictionary 0: it has 24"),
        ([made, made], {"off": [3]}, "there are 2 dictionaries"),
        ([made], {"off": [(1, 3)]}, "there are 1 dictionaries"),
        ([made], {"set": {3: float("nan")}}, "held at nan"),
    ):
        with pytest.raises(InputError, match=said):
            splice.edit(lm, given, **more)
