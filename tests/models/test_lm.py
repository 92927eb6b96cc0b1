"""The wrapped model: weights, read-out, provenance; and that wrapping and running leave no mark."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from stratoscope.engine.trace import capture
from stratoscope.errors import FamilyError, SiteError
from stratoscope.models import families, wrap
from stratoscope.models.family import Family, into
from stratoscope.models.lm import LM
from stratoscope.models.provenance import weight_hash
from support import tiny

WRITES = [n for n in tiny.CONFIGS if n != "mixtral"]


@pytest.mark.parametrize("name", WRITES)
def test_weights_write_what_the_sites_show(name: str) -> None:
    """z and the neurons through `weight`, plus the projection's bias, give what enters the stream
    (or its post-norm)."""
    lm = tiny.lm(name)
    seen = capture(
        lm,
        tiny.inputs(name),
        *(f"layers.1.{p}" for p in ("attn.z", "attn.out", "mlp.act", "mlp.out")),
    )
    for start, end in (("attn.z", "attn.out"), ("mlp.act", "mlp.out")):
        projection, *post = lm.layout.writers(lm.layout.resolve_one(f"layers.1.{end}"))
        value = seen[f"layers.1.{start}"].flatten(2) @ lm.weight(f"layers.1.{end}").T
        value = value if getattr(projection, "bias", None) is None else value + projection.bias
        for module in post:
            value = module(value)
        assert tiny.gap(value, seen[f"layers.1.{end}"]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "phi3", "modernbert", "gpt2", "bert"])
def test_the_weight_into_pre(name: str) -> None:
    lm = tiny.lm(name)
    seen = {}
    module, point = lm.layout.locate(lm.layout.resolve_one("layers.1.mlp.pre"))
    hook = module.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].detach()))
    pre = capture(lm, tiny.inputs(name), "layers.1.mlp.pre")["layers.1.mlp.pre"]
    hook.remove()
    bias = getattr(module, "bias", None)
    expected = seen["x"] @ lm.weight("layers.1.mlp.pre").T
    if bias is not None:
        expected = expected + (
            bias if point.part is None else bias.chunk(point.part[1])[point.part[0]]
        )
    assert tiny.gap(expected, pre) < 1e-5


def test_embed_and_logits_weights() -> None:
    lm = tiny.lm("llama")
    assert torch.equal(lm.weight("embed"), lm.model.get_input_embeddings().weight)
    assert torch.equal(lm.weight("logits"), lm.model.get_output_embeddings().weight)


@pytest.mark.parametrize(
    ("name", "site", "reason"),
    [
        ("llama", "layers.0.resid_pre", "no one weight"),
        ("llama", "layers.*.mlp.out", "names 3 sites"),
        ("vit", "embed", "no one weight"),
        ("mixtral", "layers.0.mlp.out", "not one projection"),
        ("bert_base", "logits", "no read-out"),
    ],
)
def test_what_has_no_weight_is_refused(name: str, site: str, reason: str) -> None:
    with pytest.raises(SiteError, match=reason):
        tiny.lm(name).weight(site)


@pytest.mark.parametrize(
    "name", [n for n in tiny.CONFIGS if n not in ("vit", "clip", "siglip", "bert_base")]
)
def test_the_read_out_is_the_model_s(name: str) -> None:
    lm = tiny.lm(name)
    sites = ["layers.2.resid_post", "logits"]
    normed = (
        lm.layout.lack(lm.layout.resolve_one("logits").__class__("", None, "final_norm")) is None
    )
    seen = capture(lm, tiny.inputs(name), *sites, *(["final_norm"] if normed else []))
    with torch.no_grad():
        assert tiny.gap(lm.readout(seen[sites[0]]), seen["logits"]) < 1e-5
        assert tiny.gap(lm.readout(seen[sites[0]][:, 1:3]), seen["logits"][:, 1:3]) < 1e-5
        if normed:
            assert tiny.gap(lm.readout(seen["final_norm"], normalised=True), seen["logits"]) < 1e-5


def test_a_read_out_that_is_not_there_is_refused() -> None:
    with pytest.raises(SiteError, match="no read-out"):
        tiny.lm("bert_base").readout(torch.zeros(1, 32))


def test_provenance_names_the_weights() -> None:
    lm = tiny.lm("llama")
    said = lm.provenance
    digest = hashlib.sha256()
    for key, value in sorted(lm.model.state_dict().items()):
        digest.update(key.encode() + value.numpy().tobytes())
    assert said["weights"] == f"sha256:{digest.hexdigest()}"
    assert (said["family"], said["dtype"], said["device"]) == ("llama", "float32", "cpu")
    assert said["kernel"] == lm.model.config._attn_implementation
    assert said["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(said)) == said
    other = tiny.model("llama", seed=1)
    assert weight_hash(other) != said["weights"]
    assert weight_hash(other.bfloat16()).startswith("sha256:")


def test_names_and_sizes() -> None:
    lm = wrap(tiny.model("qwen3"), name="a name")
    assert "a name" in repr(lm)
    d = lm.dims
    assert (d.layers, d.heads, d.kv_heads, d.dim, d.head_dim, d.neurons, d.vocab) == (
        3,
        4,
        2,
        32,
        16,
        48,
        96,
    )
    assert lm.provenance["model"] == "a name"


def test_wrapping_leaves_the_model_as_it_is() -> None:
    model = tiny.model("gpt2").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrap(model)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_table_that_does_not_fit_is_a_family_error() -> None:
    model = tiny.model("gpt2")
    llama = families.find(tiny.lm("llama").model.config)
    with pytest.raises(FamilyError, match="looks for `layers`"):
        LM(model, llama)
    gpt2 = families.find(model.config)
    lost = Family("gpt2", {"": gpt2.towers[""].but(points={"attn.z": into("attn.o_proj")})})
    with pytest.raises(FamilyError, match=r"looks for `attn\.o_proj`"):
        LM(model, lost)
    with pytest.raises(FamilyError, match="output embedding, but not at"):
        LM(model, Family("gpt2", gpt2.towers, head=("somewhere",)))


def test_provenance_says_what_a_model_with_a_short_name_really_is() -> None:
    title = wrap(tiny.model("llama"), name="smollm2").provenance["title"]
    assert "SmolLM2-135M-Instruct" in title
    assert "4-bit" in title
    assert "title" not in wrap(tiny.model("llama"), name="mine").provenance
