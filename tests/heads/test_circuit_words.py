"""A head's circuits in words: PyTorch's own SVD of the model's own weights, query heads with the
keys and values that they share, and planted heads whose words are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from stratoscope.errors import InputError, SiteError
from stratoscope.heads import circuit_words
from stratoscope.lab import planted
from stratoscope.models import wrap
from support.subjects import close, lm_of, untouched

EXAMPLE = {"measure": {"inputs": [(0, 1), (1, 2)], "draws": 3}}


def test_by_hand() -> None:
    read, write = torch.tensor([[1.0, -3.0, 2.0]]), torch.tensor([[5.0, 6.0, -7.0]])
    turned = circuit_words.signed(read, write)
    close(turned[0], -read)
    close(turned[1], -write)
    close(circuit_words.signed(-read, write)[1], write)
    scores = torch.tensor([0.0, 0.0, 0.0, 4.0])
    assert float(circuit_words.peak(scores)) == pytest.approx(3 / 2)  # mean 1, deviation 2


def llama(lm, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """W_OV and W_QK of a query head of the tiny Llama (8 dims a head, 2 query heads for each key),
    and U times the final norm's weight, from its own modules."""
    block = lm.model.model.layers[layer]
    norm, heads = block.input_layernorm.weight, slice(8 * head, 8 * head + 8)
    shared = slice(8 * (head // 2), 8 * (head // 2) + 8)
    q = block.self_attn.q_proj.weight[heads] * norm
    k, v = ((m.weight[shared]) * norm for m in (block.self_attn.k_proj, block.self_attn.v_proj))
    o = block.self_attn.o_proj.weight[:, heads]
    return o @ v, q.T @ k, lm.model.lm_head.weight * lm.model.model.norm.weight


@torch.no_grad()
@pytest.mark.parametrize("circuit", ["ov", "qk"])
@pytest.mark.parametrize("head", [(0, 1), (2, 3)])
def test_directions_are_those_of_the_models_own_weights(circuit, head) -> None:
    lm = lm_of("llama")
    with untouched(lm):
        found = circuit_words.measure(lm, [head], circuit=circuit, components=2, top=4)
    ov, qk, unembed = llama(lm, *head)
    embed = lm.model.model.embed_tokens.weight
    u, s, vt = torch.linalg.svd(ov if circuit == "ov" else qk)
    said = unembed if circuit == "ov" else embed
    # the probe that finds the weights (`composition.reads`) knows them up to 1e-3
    close(found.strength[0], s[:2], 2e-3 * float(s[0]))
    close(found.share[0], (s**2 / s.pow(2).sum())[:2], 1e-3)
    for r in range(2):
        read, write = embed @ vt[r], said @ u[:, r]
        sign = 1.0 if float(read[read.abs().argmax()]) > 0 else -1.0
        for name, products in (
            ("read", sign * read), ("write", sign * write), ("read_against", -sign * read),
            ("write_against", -sign * write),
        ):  # fmt: skip
            best = products.topk(4)
            close(found[f"{name}_score"][0, r], best.values, 5e-3)
            words = [str(i) for i in best.indices.tolist()]  # without a tokenizer, ids
            assert found[name].values[0, r].tolist() == words
        away = (read - read.mean()).abs().max() / read.std()
        assert float(found.peak_read[0, r]) == pytest.approx(float(away), rel=5e-3)


def test_an_end_goes_with_its_end() -> None:
    """Along +v a head writes +u: the sum of both, of a token and a word, is W_OV's own entry."""
    lm = lm_of("llama")
    found = circuit_words.measure(lm, [(1, 2)], components=8, top=96)
    ov, _, unembed = llama(lm, 1, 2)
    embed = lm.model.model.embed_tokens.weight
    expected = float((unembed[7] @ ov @ embed[5]).detach())
    total = 0.0
    for r in range(8):
        order = {}
        for name in ("read", "write"):
            order[name] = dict(zip(found[name].values[0, r], found[f"{name}_score"].values[0, r]))
        total += float(found.strength[0, r]) * order["read"]["5"] * order["write"]["7"]
    assert total == pytest.approx(expected, rel=2e-2, abs=2e-2)


def test_a_planted_head_says_the_words_that_it_reads() -> None:
    """L1H2 of the induction circuit copies the word that it reads: along each direction, but the
    first, which is that of all words together, it writes a word as far as it reads it. A head of
    noise does not."""
    for p in (planted.induction(), planted.induction_gpt2()):
        lm = wrap(p.model, p.tokenizer)
        found = circuit_words.measure(lm, [(1, 2), (1, 0)], components=4, top=lm.dims.vocab)
        alike = np.zeros((2, 4))
        for n, r in np.ndindex(2, 4):
            read, write = (
                dict(zip(found[side].values[n, r], found[f"{side}_score"].values[n, r]))
                for side in ("read", "write")
            )
            alike[n, r] = np.corrcoef([[read[word], write[word]] for word in read], rowvar=False)[
                0, 1
            ]
        assert alike[0, 1:].min() > 0.99
        assert abs(alike[1]).mean() < 0.5


def test_refusals() -> None:
    lm = lm_of("llama")
    for given, more, said in (
        ([(1, 4)], {}, "0 to 2 and 3"),
        ([], {}, "at least one"),
        ([(0, 0)], {"components": 9}, "a circuit has 8 components"),
        ([(0, 0)], {"top": 0}, "top=0"),
        ([(0, 0)], {"draws": 0}, "draws=0"),
    ):
        with pytest.raises(InputError, match=said):
            circuit_words.measure(lm, given, **more)
    with pytest.raises(SiteError, match="not linear"):
        circuit_words.measure(lm_of("qwen3"), [(0, 0)])
