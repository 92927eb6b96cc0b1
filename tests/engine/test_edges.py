"""Edges are what they are said to be: writes that sum to the stream, and changes that plain hooks
make alike."""

from __future__ import annotations

import random

import pytest
import torch

from stratoscope.engine import edges
from stratoscope.engine.alone import Layers
from stratoscope.engine.pair import pair
from stratoscope.engine.sent import random_directions, sent
from stratoscope.engine.trace import capture
from stratoscope.engine.wiring import wiring
from stratoscope.errors import InputError, SiteError
from stratoscope.models import wrap
from support import byhand, tiny

CLEAN, CORRUPT = [3, 14, 15, 9, 65, 35, 8], [3, 14, 77, 9, 65, 30, 8]
WITH_EDGES = [name for name in tiny.DECODERS if name != "bloom"]
BY_HAND = ("llama", "gemma2", "phi3", "gpt2", "gpt_neox")


@pytest.mark.parametrize("name", WITH_EDGES)
def test_the_writes_sum_to_what_every_receiver_reads(name):
    lm = tiny.lm(name)
    found, wires = sent(lm, lm.batch([CLEAN])), wiring(lm)
    assert len(found.writes) == len(wires.senders) == 1 + 3 * 5
    for receiver, label in enumerate(wires.receivers):
        layer, total = wires.place(receiver)[0], found.writes[: wires.before(receiver)].sum(dim=0)
        read = (
            found.final
            if label == "logits"
            else (found.mid if "mlp" in label else found.pre)[layer]
        )
        assert tiny.gap(total, read) < 1e-4, label


@pytest.mark.parametrize("name", WITH_EDGES)
def test_a_layer_alone_computes_what_it_computes_in_the_model(name):
    """q, k, v give the model's z, and the MLP its output, for several inputs at once; another input
    gives another."""
    lm = tiny.lm(name)
    batch = lm.batch([CLEAN])
    seen, found = capture(lm, batch, "layers.*.attn.z", "layers.*.mlp.out"), sent(lm, batch)
    layers = Layers(lm, batch)
    with torch.no_grad():
        for layer in range(lm.dims.layers):
            heads = layers.attention(
                layer, torch.stack([found.pre[layer], found.pre[layer].roll(1, dims=-1)])
            )
            z = heads.z(heads.q, heads.k, heads.v).transpose(1, 2)
            assert tiny.gap(z[0], seen[f"layers.{layer}.attn.z"][0]) < 1e-4
            assert tiny.gap(z[1], seen[f"layers.{layer}.attn.z"][0]) > 1e-2
            out = layers.mlp(
                layer, torch.stack([found.mid[layer], found.mid[layer].roll(1, dims=-1)])
            )
            assert tiny.gap(out[0], seen[f"layers.{layer}.mlp.out"][0]) < 1e-4
            assert tiny.gap(out[1], seen[f"layers.{layer}.mlp.out"][0]) > 1e-2


@pytest.mark.parametrize("name", BY_HAND)
def test_exact_edges_equal_plain_hooks_on_a_model_with_a_key_head_for_every_query_head(name):
    model, lm = byhand.widened(name), tiny.lm(name)
    p = byhand.parts(name, model)
    clean, corrupt = torch.tensor([CLEAN]), torch.tensor([CORRUPT])
    with torch.no_grad():
        plain = model(clean).logits
        assert tiny.gap(lm.model(clean).logits, plain) < 1e-4  # widening changes nothing
    base, source = byhand.sent(p, model, clean), byhand.sent(p, model, corrupt)
    [one] = next(edges.ends(lm, pair(lm, CLEAN, CORRUPT, 5, 9, "noise")))
    wires = wiring(lm)
    generator = random.Random(name)
    asked = []
    for kind in (".q", ".k", ".v", "mlp", "logits"):
        asked += generator.sample(
            [e for e in wires.edges if wires.receivers[e[1][0]].endswith(kind)], 8
        )
    found = edges.exact(one, one.delta, asked)
    start = float(plain[0, -1, 5] - plain[0, -1, 9])
    moved = 0
    for ((sender,), (receiver,)), got in zip(asked, found.tolist()):
        u, v = wires.senders[sender], wires.receivers[receiver]
        logits = byhand.with_edges(p, model, clean, [(v, source[u] - base[u])])
        expected = float(logits[5] - logits[9])
        assert got == pytest.approx(expected, abs=1e-4), (u, v)
        moved += abs(expected - start) > 1e-3
    assert moved > 20  # the edges do something


def test_siblings_of_a_shared_key_head_keep_theirs():
    """All query heads of a group fed at once is the shared key head changed; one of them alone is
    not."""
    lm = tiny.lm("llama")
    [one] = next(edges.ends(lm, pair(lm, CLEAN, CORRUPT, 5, 9, "noise")))
    wires = wiring(lm)
    both, first, second = wires.paths(
        [("embed", ["L1H2.k", "L1H3.k"]), ("embed", "L1H2.k"), ("embed", "L1H3.k")]
    )
    together, alone, other = edges.exact(one, one.delta, [both, first, second]).tolist()
    seen: dict[str, torch.Tensor] = {}
    layer = lm.model.model.layers[1]
    shared = slice(lm.dims.head_dim, 2 * lm.dims.head_dim)

    def keep(module, args):
        seen["in"] = args[0]

    def feed(module, args, output):
        norm = layer.input_layernorm
        output = output.clone()
        changed = type(norm).forward(norm, seen["in"] + one.delta[:1])
        output[..., shared] = type(module).forward(module, changed)[..., shared]
        return output

    pairs = [(layer.input_layernorm, keep, True), (layer.self_attn.k_proj, feed, False)]
    with byhand.hooked(*pairs), torch.no_grad():
        logits = lm.model(torch.tensor([CLEAN])).logits[0, -1]
    assert together == pytest.approx(float(logits[5] - logits[9]), abs=1e-4)
    assert abs(together - alone) > 1e-4
    assert abs(together - other) > 1e-4


def test_a_receiver_hears_those_before_it_and_no_one_else():
    """Several senders at once: the sum of their changes, by hand, and never what the receiver's own
    component sends."""
    model, lm = byhand.widened("llama"), tiny.lm("llama")
    p, clean, corrupt = byhand.parts("llama", model), torch.tensor([CLEAN]), torch.tensor([CORRUPT])
    base, source = byhand.sent(p, model, clean), byhand.sent(p, model, corrupt)
    [one] = next(edges.ends(lm, pair(lm, CLEAN, CORRUPT, 5, 9, "noise")))
    for senders, later, receiver in (
        (["embed", "L0H1"], ["L1H0", "L1H1"], "L1H0.q"),
        (["embed", "L0 mlp", "L1H2"], ["L1 mlp", "L2H0"], "L1 mlp"),
        (["L0H3", "L0 mlp"], ["L1H3"], "L1H3.v"),
    ):
        asked = wiring(lm).paths([(senders, receiver), (senders + later, receiver)])
        found = edges.exact(one, one.delta, asked).tolist()
        logits = byhand.with_edges(
            p, model, clean, [(receiver, sum(source[s] - base[s] for s in senders))]
        )
        assert found[0] == pytest.approx(float(logits[5] - logits[9]), abs=1e-4)
        assert found[1] == pytest.approx(found[0], abs=1e-6), receiver


def test_wiring_says_who_hears_whom():
    wires = wiring(tiny.lm("llama"))
    heard = {label: wires.senders[: wires.before(n)] for n, label in enumerate(wires.receivers)}
    assert heard["L0H3.v"] == ["embed"]
    assert heard["L0 mlp"] == ["embed", "L0H0", "L0H1", "L0H2", "L0H3"]
    assert heard["L1H0.q"] == [*heard["L0 mlp"], "L0 mlp"]
    assert heard["logits"] == wires.senders
    parallel = wiring(tiny.lm("gpt_neox"))
    label = parallel.receivers.index("L1 mlp")
    assert parallel.senders[: parallel.before(label)] == [*heard["L0 mlp"], "L0 mlp"]
    assert len(wires.edges) == sum(map(len, heard.values())) == int(wires.mask.sum())
    for number, label in enumerate(wires.senders):
        fed = [wires.receivers[r] for r in wires.inputs(number)]
        assert fed == (
            [f"{label}.{s}" for s in "qkv"] if "H" in label else [] if label == "embed" else [label]
        )


def test_names_are_read_and_refused():
    wires = wiring(tiny.lm("llama"))
    [path] = wires.paths([(["embed", "L0H1"], ["L1H2", "logits"])])
    coords = wires.coords([path])
    assert coords["receiver"][1] == ["L1H2.q + L1H2.k + L1H2.v + logits"]
    assert coords["sender"][1] == ["embed + L0H1"]
    assert (coords["sender_layer"][1], coords["receiver_layer"][1]) == ([-1], [3])
    backwards = ("L1 mlp", "L0H1.q")
    for wrong, said in (
        (("L9H0", "logits"), "sender"),
        (("embed", "L0H1.z"), "receiver"),
        (backwards, "no path"),
    ):
        with pytest.raises(InputError, match=said):
            wires.paths([wrong])


def test_what_has_no_edges_is_refused():
    for name in ("bloom", "bert"):
        with pytest.raises(SiteError):
            wiring(tiny.lm(name))
    lm = tiny.lm("llama")
    with pytest.raises(InputError, match="one example"):
        sent(lm, lm.batch([CLEAN, CORRUPT]))


def test_random_directions_have_the_same_lengths():
    delta = torch.randn(3, 4, 5)
    delta[1, 2] = 0
    found = random_directions(delta, 0, 4)
    assert torch.allclose(found.norm(dim=-1), delta.norm(dim=-1), atol=1e-5)
    assert float(torch.cosine_similarity(found, delta, dim=-1).abs().mean()) < 0.9
    assert found.equal(random_directions(delta, 0, 4))
    assert not found.equal(random_directions(delta, 1, 4))


def test_a_model_in_half_precision_has_edges():
    lm = wrap(tiny.model("llama").bfloat16())
    [one] = next(edges.ends(lm, pair(lm, CLEAN, CORRUPT, 5, 9, "noise")))
    found = edges.exact(one, one.delta, wiring(lm).edges[:20])
    assert found.isfinite().all()
