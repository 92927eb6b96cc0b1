"""The update is numpy's stacked ridge regression, one fact in one layer is ROME, and layer after
layer is what plain hooks on a copy of the model give."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch

from stratoscope.editing import memit, rome
from stratoscope.engine.metric import last_logits
from stratoscope.errors import InputError, SiteError
from stratoscope.lab.planted.facts import CAPITALS
from stratoscope.models import LM
from support import facts
from support.facts import FACT, LEARNED, PREFIXES, corpus, matrix, planted_fact
from support.subjects import close, lm_of, untouched

OTHER = {"prompt": [20, 21, 22, 23, 24, 25, 26], "subject": [22], "target_new": [30, 31]}
EXAMPLE = {
    "edit": lambda case: {
        "request": [FACT, OTHER] if case.lm.dims.vocab > 31 else [FACT],
        "layers": [0, 1],
        "covariance": facts.fitted(case.lm, [0, 1]),
        "prefixes": [],
        "steps": 2,
        "preserve": 1.0,
        "ridge": 0.1,
    }
}
MODELS = ("llama", "gpt2", "qwen2")
ENDS = {id(FACT): 2, id(OTHER): 2}  # where each subject ends


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("preserve", [1e-3, 1.0, 200.0])
def test_the_update_is_a_stacked_ridge_regression(preserve: float) -> None:
    """Rows for the facts, and rows for the corpus: sqrt(preserve) times a root of its moment."""
    corpus_keys, keys, missing = drawn(90, 20, seed=0), drawn(20, 4, seed=1), drawn(6, 4, seed=2)
    moment = corpus_keys.T @ corpus_keys / 90
    found = memit.spread(keys, missing, moment, preserve)
    root = np.sqrt(preserve / 90) * corpus_keys.numpy()
    stacked = np.concatenate([keys.numpy().T, root])
    right = np.concatenate([missing.numpy().T, np.zeros((90, 6))])
    close(found, np.linalg.lstsq(stacked, right, rcond=None)[0].T, 1e-9)


def test_without_preserving_every_key_is_written_in_full() -> None:
    corpus_keys, keys, missing = drawn(90, 20, seed=0), drawn(20, 4, seed=1), drawn(6, 4, seed=2)
    moment = corpus_keys.T @ corpus_keys / 90
    found = memit.spread(keys, missing, moment, 1e-12)
    close(found @ keys, missing, 1e-9)
    one = memit.spread(keys[:, :1], missing[:, :1], moment, 1e-12)
    close(one, rome.rank_one(keys[:, 0], missing[:, 0], moment), 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_one_fact_in_one_layer_is_rome(name: str) -> None:
    lm = lm_of(name)
    # sizes differ: the one's are of the write, the other's of the stream
    options = LEARNED | {"decay": 0.0, "furthest": 1e9, "ridge": 0.01, "prefixes": PREFIXES}
    moments = rome.fit(lm, corpus(), layers=1)
    with untouched(lm):
        one = rome.edit(lm, FACT, layer=1, covariance=moments, **options)
        other = memit.edit(lm, FACT, layers=[1], covariance=moments, preserve=1e-9, **options)
    assert one.deltas.keys() == other.deltas.keys()
    for name, delta in one.deltas.items():
        close(other.deltas[name], delta, 1e-5)


def copied(lm: LM) -> LM:
    model = deepcopy(lm.model)
    return LM(model, lm.family)


def stream(lm: LM, layer: int, row: list[int], end: int) -> np.ndarray:
    with torch.no_grad():
        states = lm.model(torch.tensor([row]), output_hidden_states=True).hidden_states
    return states[layer + 1][0, end].double().numpy()


@pytest.mark.parametrize("name", MODELS)
def test_layer_after_layer_as_on_a_copy_by_plain_hooks(name: str) -> None:
    """Two facts of different length, each alone there; the layers between them are changed first.
    The last layer here is not the model's last, whose states pass the final norm."""
    lm, layers, ridge, preserve = lm_of(name), [0, 1], 0.02, 3.0
    moments = rome.fit(lm, corpus(), layers=layers)
    given = {"covariance": moments, "prefixes": PREFIXES, "ridge": ridge, "preserve": preserve}
    with untouched(lm):
        made = memit.edit(lm, [FACT, OTHER], layers=[1, 0], **given, **LEARNED)
    plain, wanted = copied(lm), []
    for fact in (FACT, OTHER):
        at = stream(lm, 1, fact["prompt"], ENDS[id(fact)])
        change = facts.learned(lm, 1, fact, PREFIXES, float(np.linalg.norm(at)), **LEARNED)
        wanted.append(at + change.double().numpy())
    for left, layer in ((2, 0), (1, 1)):
        keys, missing = [], []
        for fact, z in zip((FACT, OTHER), wanted):
            end = ENDS[id(fact)]
            every = [
                facts.key(plain, layer, [*before, *fact["prompt"]], len(before) + end)
                for before in ([], *PREFIXES)
            ]
            keys.append(np.mean(every, axis=0))
            missing.append((z - stream(plain, 1, fact["prompt"], end)) / left)
        k, r = np.stack(keys, axis=1), np.stack(missing, axis=1)
        c = facts.second_moment(lm, layer, corpus())
        c += ridge * c.diagonal().mean() * np.eye(len(c))
        delta = r @ k.T @ np.linalg.inv(preserve * c + k @ k.T)
        weight = facts.projection(plain, layer).weight
        with torch.no_grad():
            moved = torch.tensor(delta.T if name == "gpt2" else delta)
            weight.copy_(weight.double() + moved)
        [found] = [d for n, d in made.deltas.items() if f".{layer}.mlp" in n]
        close(matrix(lm, found), delta, 5e-4)
    with untouched(lm), made:
        inside = lm.model(torch.tensor([corpus()[0]])).logits
    close(inside.detach(), plain.model(torch.tensor([corpus()[0]])).logits.detach(), 1e-3)
    assert len(made.deltas) == 2


@pytest.mark.parametrize("name", facts.PLANTED)
def test_planted_facts_are_rewritten_together_and_the_others_stay(name: str) -> None:
    lm, moments, asked = facts.memory(name)
    layer = facts.PLANTED[name][0]
    plain = last_logits(lm, asked)
    new = {"Kenya": "Oslo", "Peru": "Tokyo", "Cuba": "Paris"}
    made = memit.edit(
        lm,
        [planted_fact(name, *pair) for pair in new.items()],
        layers=[layer],
        covariance=moments,
        prefixes=facts.BEFORE,
        rate=0.1,
        preserve=1e-3,
        ridge=0.01 if layer else 1.0,
    )
    with untouched(lm), made:
        edited = last_logits(lm, asked)
    said = [lm.tokenizer.decode(i) for i in edited.argmax(dim=1)]
    assert said == [new.get(country, capital) for country, capital in CAPITALS.items()]
    others = [n for n, country in enumerate(CAPITALS) if country not in new]
    assert float((edited - plain).abs()[others].max()) < (2e-3 if layer else 0.3)


def test_the_corpus_is_preserved_as_much_as_there_are_neurons_unless_it_is_said() -> None:
    lm = lm_of("llama")
    moments = rome.fit(lm, corpus(), layers=1)
    options = {"layers": [1], "covariance": moments, "prefixes": [], "ridge": 0.01, "steps": 2}
    deltas = [
        next(iter(memit.edit(lm, FACT, **options, **more).deltas.values()))
        for more in ({}, {"preserve": 48.0}, {"preserve": 480.0})
    ]
    assert torch.equal(deltas[0], deltas[1])
    assert float(deltas[2].norm()) < 0.5 * float(deltas[0].norm())


def test_refusals() -> None:
    for name in ("gemma2", "gemma3", "olmo2"):
        with pytest.raises(SiteError, match=r"passes a norm .*no linear map.*editing.rome"):
            memit.edit(lm_of(name), FACT, layers=[1], covariance=facts.fitted(lm_of(name), 1))
    lm = lm_of("llama")
    options = {"covariance": facts.fitted(lm, 1), "ridge": 0.1}
    with pytest.raises(InputError, match="one layer at least"):
        memit.edit(lm, FACT, layers=[], **options)
    with pytest.raises(InputError, match=r"preserve=0.*above 0"):
        memit.edit(lm, FACT, layers=[1], preserve=0.0, **options)
    with pytest.raises(InputError, match=r"is of layers.1.mlp.act, not of `layers.2"):
        memit.edit(lm, FACT, layers=[1, 2], **options)
    with pytest.raises(InputError, match=r"the same prompt is given twice"):
        memit.edit(lm, [FACT, OTHER, FACT | {"target_new": [9]}], layers=[1], **options)
    with pytest.raises(InputError, match=r"has rank 9, and 48"):
        memit.edit(lm, FACT, layers=[1], covariance=options["covariance"], steps=1)
    made = memit.edit(lm, FACT, layers=[1], steps=1, **options)
    with untouched(lm), made, pytest.raises(InputError, match="open already"), made:
        pass
