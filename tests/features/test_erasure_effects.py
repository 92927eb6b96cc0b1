"""What an erasure does: by hand from the model's own logits and scikit-learn, and on a planted word
that goes while unrelated texts stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError, SiteError
from stratoscope.features import erasure_effects, inlp, leace
from stratoscope.lab import planted
from stratoscope.maths.resample import bound, interval
from stratoscope.models import wrap
from support.subjects import ROWS, close, lm_of, padded

SITE = "layers.1.resid_post"


def _example(case) -> dict:
    labels = [[i % 2 for i in range(len(row))] for row in case.rows * 3]
    one = leace.fit(
        case.lm, case.rows * 3, labels=labels, site="layers.0.resid_post", tokens="every"
    )
    return {
        "inputs": case.rows * 3, "labels": labels, "eraser": one, "unrelated": case.references,
        "tokens": "every", "folds": 2, "draws": 1,
    }  # fmt: skip


EXAMPLE = {"measure": _example}


def named(p: planted.Planted, words: set[str], n: int) -> tuple[list[str], list[str]]:
    kept = [v for v in p.variants(40 * n, seed=1) if v.answer in words][:n]
    return [v.clean for v in kept], [v.answer for v in kept]


def test_a_planted_word_goes_and_unrelated_texts_stay() -> None:
    p = planted.copy_head()
    lm = wrap(p.model, p.tokenizer)
    texts, names = named(p, {"Ada", "Ben"}, 160)
    others, _ = named(p, {"Cleo", "Dan", "Eve"}, 12)
    found = {}
    for method in (leace, inlp):
        eraser = method.fit(lm, texts[:80], labels=names[:80], site=SITE)
        found[method] = erasure_effects.measure(
            lm, texts[80:], labels=names[80:], eraser=eraser, unrelated=others, draws=20
        )
    ours, rival = found[leace], found[inlp]
    assert float(ours.right_before.mean()) == 1
    assert interval(ours.right.values).low < float(ours.chance)  # no better than chance
    assert float(ours.kl.mean()) < float(rival.kl.mean()) + 1e-9
    assert float(ours.kl.mean()) < bound(ours["null"].values)
    # an eraser of what says the other names is seen to harm them
    more, others_names = named(p, {"Cleo", "Dan", "Eve"}, 90)
    harmful = leace.fit(lm, more, labels=others_names, site=SITE)
    harmed = erasure_effects.measure(
        lm, texts[80:], labels=names[80:], eraser=harmful, unrelated=others, draws=20
    )
    assert float(harmed.kl.mean()) > 10 * float(ours.kl.mean())
    assert float(harmed.kl.mean()) > bound(harmed["null"].values)
    assert float(harmed.right.mean()) == 1


def test_numbers_are_those_of_the_model_by_hand() -> None:
    lm = lm_of("gpt2")
    texts = ROWS * 3
    labels = [[i % 2 for i in range(len(row))] for row in texts]
    given = {"labels": labels, "tokens": "every"}
    eraser = leace.fit(lm, texts, site=SITE, **given)
    found = erasure_effects.measure(
        lm, texts, eraser=eraser, unrelated=ROWS, folds=2, draws=2, **given
    )
    again = erasure_effects.measure(
        lm, padded(texts, "left"), eraser=eraser, unrelated=padded(ROWS, "left"), folds=2, draws=2,
        **given,
    )  # fmt: skip
    close(again.kl, found.kl)
    close(again["null"], found["null"])
    with torch.no_grad():
        for n, row in enumerate(ROWS):
            plain = lm.model(torch.tensor([row]))

            def hook(_, args, out):
                x = out[0] if isinstance(out, tuple) else out
                return (eraser(x), *out[1:]) if isinstance(out, tuple) else eraser(x)

            handle = lm.model.transformer.h[1].register_forward_hook(hook)
            inside = lm.model(torch.tensor([row])).logits
            handle.remove()
            p, q = (x.double().log_softmax(-1)[0] for x in (plain.logits, inside))
            close(found.kl[n], (p.exp() * (p - q)).sum(-1).mean())
            assert float(found.kl[n]) > 1e-4
    hidden = [
        lm.model(torch.tensor([r]), output_hidden_states=True).hidden_states[2][0] for r in texts
    ]
    x = torch.cat(hidden).detach().double()
    close(found.moved, (eraser(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
    assert float(found.chance) == pytest.approx(
        np.mean([0 in [i % 2] for r in texts for i in range(len(r))])
    )


def test_probes_are_held_out_by_text() -> None:
    """A mark of each text, which says its kind, is of no use where the text is held out whole."""
    g = np.random.default_rng(0)
    text = np.repeat(np.arange(20), 6)
    kinds = text % 2
    marks = np.eye(20)[text] + 0.01 * g.normal(size=(120, 20))
    how = {"folds": 5, "strength": 1.0, "seed": 0}
    assert erasure_effects.held_out(marks, kinds, text, **how).mean() < 0.6
    plain = kinds[:, None] + 0.01 * g.normal(size=(120, 3))
    assert erasure_effects.held_out(plain, kinds, text, **how).mean() == 1
    with pytest.raises(InputError, match="would not see every kind"):
        erasure_effects.held_out(plain, (text > 18).astype(int), text, **how)


def test_refusals() -> None:
    lm = lm_of("llama")
    labels = [[i % 2 for i in range(len(row))] for row in ROWS]
    eraser = leace.fit(lm, ROWS, labels=labels, site=SITE, tokens="every")
    given = {"labels": labels, "eraser": eraser, "unrelated": ROWS, "tokens": "every"}
    with pytest.raises(InputError, match="draws=0, folds=2"):
        erasure_effects.measure(lm, ROWS, folds=2, draws=0, **given)
    with pytest.raises(SiteError, match="no vocabulary read-out"):
        erasure_effects.measure(lm_of("bert_base"), ROWS, **given)
