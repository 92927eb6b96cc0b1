"""A planted channel is found and undone, which random directions do not do; a channel by plain
hooks; the search sees no prompt that is judged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError, SiteError
from stratoscope.heads import channel_search, composition
from stratoscope.lab import planted
from stratoscope.models import wrap
from support.subjects import ROWS, close, lm_of, padded, parts, untouched

EXAMPLE = {
    "measure": lambda case: {
        "answer": case.answer,
        "components": [1],
        "factors": [0.0, 3.0],
        "draws": 2,
        "search": 1,
    }
}
WHOLE_ANSWER = {"search": 1}
ONE_TOKEN = "is the next token"
TEXTS = np.random.default_rng(4).integers(3, 96, size=(6, 7)).tolist()


@torch.no_grad()
def crowded() -> tuple[planted.Planted, list[planted.Variant]]:
    """A head that speaks so loudly against two of the names that they are never said, along two
    directions; and prompts with these names."""
    p = planted.suppression()
    [(layer, head)] = p.opposing_heads
    output = p.model.model.layers[layer].self_attn.o_proj.weight
    ids = [p.tokenizer.convert_tokens_to_ids(name) for name in ("Ada", "Ben")]
    slots = [head * 64 + 8 + number for number in ids]  # a head's slot for each word
    louder = 4 * output[:, slots]
    output[:, head * 64 : (head + 1) * 64] = 0
    output[:, slots] = louder
    return p, [x for x in p.variants(120) if x.answer in ("Ada", "Ben")]


def test_the_planted_channel_is_found_and_random_directions_are_not() -> None:
    p, prompts = crowded()
    [loud] = p.opposing_heads
    lm = wrap(p.model, p.tokenizer)
    with untouched(lm):
        found = channel_search.measure(
            lm,
            [x.clean for x in prompts],
            answer=[x.answer for x in prompts],
            components=(1, 2),
            factors=(0.0, 2.0),
            search=8,
            draws=5,
        )
    assert found.sizes["tried"] == 2 * 4 * 2 * 2
    best = found.isel(tried=int(found.best))
    assert (int(best.layer), int(best["head"])) == loud
    assert (int(best.components), float(best.factor)) == (2, 0.0)
    assert float(best.right) == 1
    assert (
        found.right.drop_isel(tried=int(found.best)).max() < 1
    )  # one of two directions is not all
    assert not found.plain.any()
    assert (found.gain == 1).all()
    assert found.sizes["judged"] == len(prompts) - 8 > 10
    assert float(abs(found.null).max()) < 0.2
    assert found.judged_text.values.tolist() == [x.clean for x in prompts[8:]]
    # as an edit of weights, at every token
    with composition.edit(lm, [loud], components=range(2), factor=0.0), torch.no_grad():
        tokens = p.tokenizer([x.clean for x in prompts[:3]], return_tensors="pt", padding=True)
        said = p.model(**tokens).logits[range(3), tokens["attention_mask"].sum(1) - 1].argmax(1)
    assert p.tokenizer.convert_ids_to_tokens(said.tolist()) == [x.answer for x in prompts[:3]]


def test_a_channel_by_plain_hooks() -> None:
    lm, answers = lm_of("llama"), [5, 60, 7, 8, 9, 10]
    found = channel_search.measure(
        lm, TEXTS, answer=answers, components=[2], factors=[0.0, 3.0], search=4, draws=1
    )
    layer = lm.model.model.layers[1]
    norm, size = layer.input_layernorm.weight.detach(), 8
    values = layer.self_attn.v_proj.weight.detach() * norm
    group = 2 * size // (32 // len(values))  # the key-value head that query head 2 shares
    v = values[group // size * size :][:size]
    o = layer.self_attn.o_proj.weight.detach()[:, 2 * size : 3 * size]
    u = torch.linalg.svd(o @ v).U[:, :2]

    def margins(factor: float) -> list[float]:
        result = []
        for row, answer in zip(TEXTS, answers):

            def turn(module, args, out):
                written = args[0][0, -1, 2 * size : 3 * size] @ o.T
                out[0, -1] += (factor - 1) * (written @ u) @ u.T
                return out

            hook = parts(lm, 1)[0].register_forward_hook(turn)
            with torch.no_grad():
                logits = lm.model(torch.tensor([row])).logits[0, -1]
            hook.remove()
            rest = torch.cat([logits[:answer], logits[answer + 1 :]])
            result.append(float(logits[answer] - rest.max()))
        return result

    for factor in (0.0, 3.0):
        at = (found.layer == 1) & (found["head"] == 2) & (found.factor == factor)
        close(found.margin.values[at.values], [np.mean(margins(factor)[:4])])
    best = found.isel(tried=int(found.best))
    assert float(best.margin) == float(found.margin.max())  # no answer is right


def test_what_is_judged_is_not_searched_with() -> None:
    lm, words = lm_of("gpt2"), {"search": 3, "draws": 6, "heads": [(1, 2), (0, 3)]}
    answers = [5, 60, 7, 8, 9, 10]
    one = channel_search.measure(lm, TEXTS, answer=answers, **words)
    two = channel_search.measure(
        lm, [*TEXTS[:3], *TEXTS[:2:-1]], answer=[*answers[:3], 10, 9, 8], **words
    )
    close(one.margin, two.margin)
    for name in ("right", "best", "null_best"):
        assert (one[name] == two[name]).all()
    close(one.margin_gain.values, two.margin_gain.values[::-1], 1e-4)
    assert one.sizes["tried"] == 2 * 2 * 3
    assert len({*one.null_best.values.tolist()}) > 1  # each basis has a best of its own


def test_all_random_directions_together_are_all_there_are() -> None:
    """Then a random basis is searched with the same result as the head's own."""
    found = channel_search.measure(
        lm_of("llama"), padded(ROWS, "left"), answer=[5, 60], components=[8], draws=3, search=1
    )
    assert set(found.null_best.values) == {int(found.best)}
    close(found.null_margin_gain, np.repeat(float(found.margin_gain.mean()), 3))
    assert (found.null == float(found.gain.mean())).all()


def test_of_equals_the_larger_margin_and_then_the_earlier() -> None:
    margins = torch.tensor([[1.0, -9.0], [1.0, -1.0], [1.0, -1.0], [-0.1, 5.0], [9.0, -0.0]])
    assert channel_search.first(margins) == 4
    assert channel_search.first(margins[:4]) == 3
    assert channel_search.first(margins[:3]) == 1
    assert channel_search.first(torch.tensor([[9.0, -1.0], [0.1, 0.1]])) == 1
    logits = torch.tensor([[1.0, 5.0, 2.0], [1.0, 5.0, 2.0]])
    assert channel_search.margin(logits, torch.tensor([1, 2])).tolist() == [3.0, -3.0]


def test_refusals() -> None:
    lm = lm_of("llama")
    for options, said in (
        ({"search": 2}, "leave one to judge"),
        ({"search": 0}, "leave one to judge"),
        ({"heads": [(0, 4)]}, "0 to 2 and 3"),
        ({"heads": []}, "give heads"),
        ({"components": [9]}, "from 1 to 8"),
        ({"draws": 0}, "at least one"),
    ):
        with pytest.raises(InputError, match=said):
            channel_search.measure(lm, ROWS, **options)
    with pytest.raises(SiteError, match="norms what its heads write"):
        channel_search.measure(lm_of("gemma2"), ROWS)
    with pytest.raises(SiteError, match="not linear"):
        channel_search.measure(lm_of("qwen3"), ROWS)
