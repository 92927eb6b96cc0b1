"""Roles of heads: hand-made patterns, planted heads, and the same numbers from Hugging Face's own
modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from stratoscope.errors import InputError, SiteError
from stratoscope.heads import roles
from stratoscope.heads._copied import copied
from stratoscope.lab import planted
from stratoscope.layers import direct_logit_attribution
from stratoscope.models import wrap
from support import tiny
from support.subjects import ROWS, THREE, close, entering, lm_of, padded, untouched

EXAMPLE = {"measure": lambda case: {"answer": case.answer, "foil": case.foil}}
ONE_TOKEN = "one token's logit"

LOOKS = ["previous_token", "duplicate_token", "induction"]
FEW = {"repeats": 2, "length": 6}


def test_repeated_roles_by_hand() -> None:
    length, size = 5, 11  # one first token, then a text twice
    one_hot = torch.zeros(2, 3, size, size)
    for query in range(1, size):
        one_hot[:, 0, query, query - 1] = 1
        one_hot[:, 1, query, max(query - length, 0)] = 1
        one_hot[:, 2, query, max(query - length + 1, 0)] = 1
    assert torch.allclose(roles.repeated_roles(one_hot, length), torch.eye(3), atol=0.11)
    assert roles.repeated_roles(one_hot, length).diagonal().tolist() == [1, 1, 1]


@pytest.mark.parametrize("causal", [True, False])
def test_null_is_uniform_attention(causal: bool) -> None:
    seen = lambda i: i + 1 if causal else 11  # noqa: E731
    expected = (
        np.mean([1 / seen(i) for i in range(1, 11)]),
        np.mean([1 / seen(i) for i in range(6, 11)]),
    )
    [found] = roles.repeated_roles(roles.uniform(11, causal), 5)
    close(found, [expected[0], expected[1], expected[1]], 1e-6)


def test_what_few_tokens_leave_open_is_asked_of_all() -> None:
    """Some heads copy, some do not: as with every row's logits over the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    # token 0 is among the few, however few
    unembed, own = torch.randn(500, 16, generator=generator), torch.tensor([0, 7, 7, 450])
    strength = torch.tensor([0.0, 0.3, 1.0, 3.0])[:, None]
    out = strength * unembed[own][:, None] + torch.randn(4, 4, 16, generator=generator)
    out[:, 0] = 0  # a silent head: every token ties
    logits = out @ unembed.T
    inside = (logits > logits.topk(6, dim=-1).values[..., -1:])[..., own.unique()].float()
    mine = inside.gather(2, torch.tensor([0, 1, 1, 2])[:, None, None].expand(4, 4, 1))[..., 0]
    expected = torch.stack([mine, (inside.sum(2) - mine) / 2]).mean(dim=1)
    for some in (1, 20, 500):
        assert torch.allclose(copied(out, unembed, own, 5, some), expected)
    assert expected[0, 0] == 0 < expected[0, 2] < 1 == expected[0, 3]


def test_copied_and_moved_by_hand() -> None:
    logits = torch.tensor([[9.0, 1, 2, 3], [9, 8, 0, 0], [1, 1, 1, 1]])
    own = torch.tensor([0, 2, 0])  # words are 0 and 2; top 1: hit, miss, tie
    eye, one = torch.eye(logits.shape[1]), logits[:, None]
    assert copied(one, eye, own, 1)[:, 0].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert torch.isnan(copied(one[:1], eye, own[:1], 1)[1])  # no other word
    carried = torch.tensor([[1.0], [2], [4], [9]])
    found = roles.moved(carried, torch.tensor([False, True, True, False]))
    assert found[:, 0].tolist() == [6, 10]


@pytest.mark.parametrize("p", [planted.induction(), planted.induction_gpt2()], ids=lambda p: p.name)
def test_planted_induction(p: planted.Planted) -> None:
    lm = wrap(p.model, p.tokenizer)
    with untouched(lm):
        found = roles.measure(lm, p.clean, answer=p.answer, foil=p.foil)
    top = {
        role: divmod(int(found.score.sel(role=role).values.argmax()), 4)
        for role in found.role.values
    }
    assert top["previous_token"] == (0, 1)
    assert top["induction"] == top["copying"] == top["name_mover"] == (1, 2)
    # GPT-2's 32 positions; the first word has no predecessor, half of its attention stays on itself
    size = 16
    assert float(found.score.sel(role="previous_token")[0, 1]) > 0.99
    assert float(found.score.sel(role="induction")[1, 2]) == pytest.approx(
        (size - 0.5) / size, abs=0.01
    )
    assert float(found.score.sel(role="copying")[1, 2]) == 1
    # it writes where the read-out does not look
    assert float(found.score.sel(role="copying")[0, 1]) == 0
    assert float(found.score.sel(role="name_mover")[1, 2]) == pytest.approx(10, abs=0.5)
    assert (abs(found.null.sel(role="name_mover")) < 0.05).all()
    assert (found.null.sel(role="copying")[1, 2]) < 0.3
    others = found.score.sel(role=LOOKS).values.copy()
    others[0, 1, 0] = others[1, 2, 2] = 0
    assert others.max() < 0.15
    assert "16 words, not 24" in found.attrs["notes"]
    assert all(found.attrs[f"definition_{role}"] for role in found.role.values)


def test_planted_copy_and_previous() -> None:
    for p, role in (
        (planted.copy_head(), "name_mover"),
        (planted.previous_token_head(), "previous_token"),
    ):
        found = roles.measure(wrap(p.model, p.tokenizer), p.clean, answer=p.answer, foil=p.foil)
        [head] = p.heads
        for name in (role, "copying"):
            score = found.score.sel(role=name).values
            assert divmod(int(score.argmax()), 4) == head
            assert score[head] > found.null.sel(role=name).values[head] + 0.5


def test_planted_name_mover() -> None:
    p = planted.indirect_object()
    found = roles.measure(wrap(p.model, p.tokenizer), p.clean, answer=p.answer, foil=p.foil)
    score = found.score.sel(role="name_mover").values
    mover = max(p.heads)  # the last of the circuit; its backup rests and copies nothing
    assert divmod(int(score.argmax()), 4) == mover
    score[mover] = 0
    assert abs(score).max() < 0.1


@pytest.mark.parametrize("name", THREE)
@torch.no_grad()
def test_patterns_equal_hugging_face(name: str) -> None:
    lm, texts = lm_of(name), []
    hook = lm.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: texts.append(args[0])
    )
    found = roles.measure(lm, ROWS, **FEW)
    hook.remove()
    [ids] = [x for x in texts if x.shape == (2, 12)]
    other = tiny.model(name)
    other.set_attn_implementation("eager")
    # layer, text, head, query, key
    pattern = torch.stack(other(ids, output_attentions=True).attentions)
    expected = torch.zeros(3, 4, 3)
    for query in range(1, 12):
        expected[..., 0] += pattern[:, :, :, query, query - 1].mean(dim=1) / 11
    for query in range(6, 12):
        expected[..., 1] += pattern[:, :, :, query, query - 6].mean(dim=1) / 6
        expected[..., 2] += pattern[:, :, :, query, query - 5].mean(dim=1) / 6
    close(found.score.sel(role=LOOKS), expected, 1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_copying_equals_hugging_face(name: str) -> None:
    """From Hugging Face's modules: value vectors, a slice of the output projection, the norm's
    weight, the read-out."""
    lm, row = lm_of(name), ROWS[0]
    size, expected = lm.dims.head_dim, np.zeros((3, 4))
    for layer in range(3):
        if name == "gpt2":
            block = lm.model.transformer.h[layer]
            v = block.attn.c_attn(entering(lm, block.attn.c_attn, row))[:, 64:].unflatten(
                1, (4, size)
            )
            out = block.attn.c_proj.weight.T
        else:
            attention = lm.model.model.layers[layer].self_attn
            v = attention.v_proj(entering(lm, attention.v_proj, row)).unflatten(1, (2, size))[
                :, [0, 0, 1, 1]
            ]
            out = attention.o_proj.weight
        for head in range(4):
            write = v[:, head] @ out[:, head * size : (head + 1) * size].T
            if name == "gpt2":
                write = (write - write.mean(dim=1, keepdim=True)) * lm.model.transformer.ln_f.weight
            else:
                write = write * lm.model.model.norm.weight
            top = (write @ lm.model.lm_head.weight.T).topk(5).indices
            expected[layer, head] = np.mean(
                [token in best for token, best in zip(row, top.tolist())]
            )
    assert expected.max() > 0
    close(roles.measure(lm, [row], **FEW).score.sel(role="copying"), expected, 1e-6)


@pytest.mark.parametrize("name", [*THREE, "gpt_neox"])
def test_name_mover_is_attribution(name: str) -> None:
    """Where every token is the answer, all of a head's direct attribution is through the answer's
    tokens."""
    lm = lm_of(name)
    rows, options = [[7] * 6], {"answer": 7, "foil": 50}
    found = roles.measure(lm, rows, **options, **FEW)
    whole = direct_logit_attribution.measure(lm, rows, **options)
    expected = whole.contribution[0, whole.kind == "head"].values.reshape(3, 4)
    close(found.score.sel(role="name_mover"), expected, 1e-4)
    assert np.isnan(found.null.sel(role="name_mover")).all()


def test_name_mover_reads_only_the_answer() -> None:
    lm, row = lm_of("llama"), ROWS[0]
    alone = [
        roles.measure(lm, [row], answer=token, foil=50, **FEW).sel(role="name_mover")
        for token in row
    ]
    assert np.isnan(
        roles.measure(lm, [row], answer=51, foil=50, **FEW).score.sel(role="name_mover")
    ).all()
    for found, token in zip(alone, row):  # each stands once: null is the mean of the seven others
        whole = direct_logit_attribution.measure(lm, [row], answer=token, foil=50)
        expected = whole.contribution[0, whole.kind == "head"].values.reshape(3, 4)
        close(found.score + 7 * found.null, expected, 1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    lm = lm_of("gpt2")
    options = {"answer": 3, "foil": 60} | FEW
    found, other = (
        roles.measure(lm, padded(ROWS, side), **options),
        roles.measure(lm, ROWS, **options),
    )
    alone = [roles.measure(lm, [row], **options) for row in ROWS]
    assert np.array_equal(found.score, other.score)
    # both prompts hold token 3 once; copying is the mean over their 8 and 5 words
    for role, weights in (("name_mover", (1, 1)), ("copying", (8, 5))):
        mean = np.average([x.score.sel(role=role) for x in alone], axis=0, weights=weights)
        close(found.score.sel(role=role), mean, 1e-5)


def tokenizer_with_bos() -> PreTrainedTokenizerFast:
    tokens = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 90)}
    words = Tokenizer(models.WordLevel(tokens, unk_token="<pad>"))
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def test_random_texts() -> None:
    lm = wrap(tiny.model("llama"), tokenizer_with_bos())
    texts = []
    hook = lm.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: texts.append(args[0])
    )
    found = [roles.measure(lm, [ROWS[1]], repeats=3, length=1000, seed=seed) for seed in (0, 0, 1)]
    hook.remove()
    first, again, other = [x for x in texts if x.shape == (3, 1 + 2 * 87)]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert found[0].identical(found[1])
    assert (first[:, 0] == 1).all()
    assert torch.equal(first[:, 1:88], first[:, 88:])
    # no special one, none twice
    assert all(sorted(row) == list(range(3, 90)) for row in first[:, 1:88].tolist())


def test_refusals() -> None:
    lm = lm_of("llama")
    for options in ({"repeats": 0}, {"length": 1}):
        with pytest.raises(InputError, match="at least 1 text"):
            roles.measure(lm, ROWS, **options)
    with pytest.raises(SiteError, match="ALiBi"):
        roles.measure(lm_of("bloom"), ROWS)
    for name in ("vit", "clip"):
        with pytest.raises(InputError, match="text alone"):
            roles.measure(lm_of(name), tiny.inputs(name))
    found = roles.measure(lm_of("bert"), ROWS, **FEW)  # patterns yes, the vocabulary no
    assert np.isnan(found.score.sel(role=["copying", "name_mover"])).all()
    assert not np.isnan(found.score.sel(role=LOOKS)).any()
    assert "not linear" in found.attrs["notes"]
    close(found.null.sel(role=LOOKS), np.full((3, 4, 3), 1 / 12), 1e-6)
