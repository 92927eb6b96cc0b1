"""heads.direct_effect: against plain hooks, on a planted head, and its null."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError, SiteError
from stratoscope.heads import direct_effect
from stratoscope.lab import planted
from stratoscope.models import wrap
from support import zoo
from support.subjects import CORRUPT, ROWS, close, entering, lm_of, padded, parts, untouched

EXAMPLE = {"measure": lambda case: {"corrupt": case.corrupt, "answer": case.answer}}
ONE_TOKEN = "cannot be asked whole"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_it_is_what_plain_transformers_gives(name: str) -> None:
    """One head's corrupt write in the stream that the final norm reads, by plain hooks."""
    lm = lm_of(name)
    model, size = lm.model, lm.dims.head_dim
    base = model.transformer if name == "gpt2" else model.model
    final = base.ln_f if name == "gpt2" else base.norm
    head_effect = np.zeros((2, lm.dims.layers, lm.dims.heads))
    mlp_effect = np.zeros((2, lm.dims.layers))

    def logit(x: torch.Tensor) -> float:
        return float(model.get_output_embeddings()(final(x[None]))[0, 5])

    for example, pair in enumerate(zip(ROWS, CORRUPT)):
        clean = entering(lm, final, pair[0])[-1]
        start = logit(clean)
        for layer in range(lm.dims.layers):
            out, down = parts(lm, layer)
            z, act = ([entering(lm, part, row)[-1] for row in pair] for part in (out, down))
            weight, below = (m.weight if name == "gpt2" else m.weight.T for m in (out, down))
            moved = clean + (act[1] - act[0]) @ below
            mlp_effect[example, layer] = (logit(moved) - start) / abs(start)
            for head in range(lm.dims.heads):
                here = slice(head * size, (head + 1) * size)
                moved = clean + (z[1] - z[0])[here] @ weight[here]
                head_effect[example, layer, head] = (logit(moved) - start) / abs(start)
    with untouched(lm):
        found = direct_effect.measure(lm, padded(ROWS, "left"), corrupt=CORRUPT, answer=5)
    close(found.change, head_effect, 1e-4)
    close(found.mlp_change, mlp_effect, 1e-4)
    close(found.effect, head_effect.mean(axis=0), 1e-4)
    close(found.mlp_effect, mlp_effect.mean(axis=0), 1e-4)
    ends = [
        [model(torch.tensor([row])).logits[0, -1, 5] for row in rows] for rows in (ROWS, CORRUPT)
    ]
    close(found.clean_logit, ends[0], 1e-4)
    close(found.corrupt_logit, ends[1], 1e-4)


def test_logits_are_the_models_own_with_a_cap_and_a_scale() -> None:
    for lm in (lm_of("gemma2"), zoo.lm("cohere"), lm_of("llama")):
        x = torch.randn(3, 2, lm.dims.dim, generator=torch.Generator().manual_seed(0))
        answer = torch.tensor([7, 90])
        expected = lm.readout(x)[:, [0, 1], answer]
        close(direct_effect.logit_of(lm, x, answer).detach(), expected.detach(), 1e-5)


def test_a_planted_head_is_the_first_and_chance_is_not() -> None:
    p = planted.copy_head()
    lm, some = wrap(p.model, p.tokenizer), p.variants(8, seed=1)
    found = direct_effect.measure(
        lm,
        [v.clean for v in some],
        corrupt=[v.corrupt for v in some],
        answer=[v.answer for v in some],
        draws=20,
    )
    [(layer, head)] = p.heads
    effect = found.effect.values
    assert direct_effect.strongest(effect, 1) == [f"L{layer}H{head}"]
    assert effect[layer, head] < -0.8
    rest = np.delete(effect.ravel(), layer * lm.dims.heads + head)
    assert np.abs(rest).max() < 0.05
    assert np.abs(found.null_effect).max() < 0.5 * abs(effect[layer, head])


def test_the_strongest_are_those_without_which_most_is_lost() -> None:
    effect = np.array([[0.3, -0.1], [-0.5, 0.0]])
    assert direct_effect.strongest(effect, 3, [0.1, -0.2], 1) == ["L1H0", "L0H1", "L1H1", "L1 mlp"]


def test_refusals() -> None:
    lm = lm_of("llama")
    with pytest.raises(InputError, match="1 corrupt ones"):
        direct_effect.measure(lm, ROWS, corrupt=ROWS[:1])
    with pytest.raises(SiteError, match="not a sum"):
        direct_effect.measure(lm_of("bert"), ROWS, corrupt=CORRUPT)
