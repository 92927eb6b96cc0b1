"""Methods on encoder-decoders: those that work, against sums and plain runs; those that do not, by
name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stratoscope import catalogue
from stratoscope.engine.intervene import intervene, replaced
from stratoscope.engine.sweep import naive, sweep
from stratoscope.engine.trace import capture
from stratoscope.errors import SiteError
from stratoscope.heads import activation_patching as heads_patching
from stratoscope.layers import activation_patching, direct_logit_attribution, logit_lens
from support import zoo_towers as zoo

ANSWER, FOIL = [7, 8, 9], [10, 11, 12]


def other(name: str) -> Any:
    """The same targets beside other sources."""
    if name == "whisper":
        given = zoo.source(name)["input_features"].roll(1, 0)
        return zoo.lm(name).batch({"input_features": given}, target=zoo.SAID)
    return zoo.lm(name).batch([row[::-1] for row in zoo.SOURCES], target=zoo.SAID)


def difference(logits: torch.Tensor, batch: Any) -> torch.Tensor:
    rows = torch.arange(3)
    last = logits[rows, batch.lengths - 1]
    return last[rows, ANSWER] - last[rows, FOIL]


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_direct_attribution_sums_to_the_logit_difference(name: str) -> None:
    lm, batch = zoo.lm(name), zoo.batch(name)
    found = direct_logit_attribution.measure(lm, batch, answer=ANSWER, foil=FOIL)
    own = difference(lm(batch).logits, batch).detach()
    assert zoo.gap(found.total.values, own) < 1e-4
    cross = found.contribution.values[:, [k == "cross" for k in found.kind.values]]
    assert cross.shape == (3, lm.dims.layers)
    assert abs(cross).min() > 0
    if name == "t5":  # an RMS norm, linear in a part of the stream while its scale is held
        last = f"layers.{lm.dims.layers - 1}.resid_post"
        seen = capture(lm, batch, "layers.0.cross.out", last, positions=-1)
        unembed = lm.weight("logits")
        with torch.no_grad():
            part = seen["layers.0.cross.out"] * lm.layout.final_norm(seen[last]) / seen[last]
            expected = (part * (unembed[ANSWER] - unembed[FOIL])).sum(-1)
        assert zoo.gap(cross[:, 0], expected) < 1e-4


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_activation_patching_equals_plain_interventions(name: str) -> None:
    """Of the stream at each position, of heads, and of the encoder's stream by `sweep`."""
    lm, batch, clean = zoo.lm(name), zoo.batch(name), other(name)
    found = activation_patching.measure(lm, clean, corrupt=batch, answer=ANSWER, foil=FOIL)
    stream = capture(lm, clean, "layers.1.resid_pre")["layers.1.resid_pre"]
    patch = replaced("layers.1.resid_pre", stream[:, 1:2], positions=1)
    with torch.no_grad():
        base, end = difference(lm(batch).logits, batch), difference(lm(clean).logits, batch)
        with intervene(lm, patch):
            changed = difference(lm(batch).logits, batch)
    got = found["effect"].sel(layer=1, position=1).values
    assert zoo.gap(got, (changed - base) / (end - base)) < 1e-3
    heads = heads_patching.measure(lm, clean, corrupt=batch, answer=ANSWER, foil=FOIL)
    assert heads.sizes["head"] == 4
    depth = lm.layout.dims["encoder"].layers
    sites = [f"encoder.layers.{depth - 1}.resid_post", "layers.1.cross.z", "layers.0.cross.pattern"]
    run = capture(lm, clean, *sites)
    cells = [replaced(site, run[site]) for site in sites]
    metric = lambda logits, example: logits[:, 7] - logits[:, 10]  # noqa: E731
    assert torch.equal(sweep(lm, batch, cells, metric), naive(lm, batch, cells, metric))


def test_the_logit_lens_ends_in_what_the_model_says() -> None:
    lm, batch = zoo.lm("t5"), zoo.batch("t5")
    found = logit_lens.measure(lm, batch)
    own = torch.softmax(lm(batch).logits, dim=-1).max(dim=-1).values.detach()
    top = found["probability"].isel(depth=-1)
    top = top.isel(rank=0) if "rank" in top.dims else top
    real = batch.mask.numpy()
    assert zoo.gap(top.values[real], own[batch.mask]) < 1e-4


REFUSED = (
    "circuits.edge_attribution", "circuits.faithfulness", "heads.mlp_decomposition", "heads.roles",
    "heads.retrieval_score", "layers.module_importance", "tokens.integrated_gradients",
    "tokens.shapley", "tokens.verbatim_recall", "neurons.convergent_learning",
)  # fmt: skip


@pytest.mark.parametrize("address", REFUSED)
def test_what_does_not_work_is_refused_by_name(address: str) -> None:
    lm, batch = zoo.lm("t5"), zoo.batch("t5")
    options = {
        "circuits.edge_attribution": {"corrupt": other("t5")},
        "circuits.faithfulness": {"corrupt": other("t5")},
        "neurons.convergent_learning": {"other": lm},
    }.get(address, {})
    with pytest.raises(SiteError, match=r"t5's decoder reads its encoder by cross-attention: \w+"):
        catalogue.module(address).measure(lm, batch, **options)
