"""Characterizing Verbatim Short-Term Memory in Neural Language Models.

Armeni, Honey and Linzen, 2022. arXiv:2210.13569.
Claim: transformers retrieve which nouns stood in a list and in what order, over long delays, through learned attention; a
    recurrent network keeps a coarse gist that decays and knows no order.
Methods: tokens.verbatim_recall

The paper's vignette is used: someone writes a list down, does something else, and reads the list again. Its x2 / x1 takes
the first list of the same story as x1; here x1 is the same nouns read first, which for an unchanged list is the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import xarray as xr

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.lab import planted
from stratoscope.models import LM
from stratoscope.tokens import verbatim_recall

OPENING = "Mary wrote down a list of words:"
PAUSE = " After the meeting, she took a break and had a cup of coffee. When she got back, she read the list again:"
DELAY = """ After the meeting, she walked home along the river. It had rained in the morning, and the streets were still wet.
At the corner she met an old friend who told her about his new job in another city. They talked for a while about the people
they both knew, about the weather and about the summer, and then he had to catch his train. At home she cooked some soup, fed
the cat and watered the plants. In the evening she sat down at the table and turned on the light. There she read the list
again:""".replace("\n", " ")
NOUNS = """window patience notebook river engine candle theory garden soldier kitchen mirror justice basket winter doctor
island needle music castle shadow ticket farmer bottle memory bridge hammer market poetry jacket rabbit signal temple mountain
pencil danger blanket harbor planet dinner monkey treaty""".split()
LISTS, LENGTH = 40, 10


@claim(
    says="A list that stands in the context is read again with little surprisal",
    where="section 3 (paradigm)",
    tier="identity",
    subject="planted.induction",
    expect="repeat < 0.5 * unrelated",
    null="the same list after random words in place of itself",
)
def a_planted_copier_recalls(seed: int) -> Measured:
    """A hand-built induction circuit reads eight words twice."""
    p = planted.induction(seed)
    lm = models.wrap(p.model, p.tokenizer)
    words = [word for word in p.tokenizer.get_vocab() if word.isalpha()][:8]
    found = verbatim_recall.measure(lm, " ".join(words), opening=words[-1], seed=seed)
    return Measured(values={"repeat": found.repeat.item()}, null={"unrelated": found.repeat_null.item()}, n=1)


@claim(
    says="Transformers retrieve both the identity and the order of the nouns",
    where="abstract; section 4 (repeat surprisal by condition)",
    tier="small",
    subject="smollm2",
    expect="repeat <= 0.4 and permuted >= repeat + 0.15 and novel >= repeat + 0.4",
    direction="repeat < permuted and permuted < novel",
    null="novel: another list of nouns stood there; scrambled: the same list, read by the model with the key dimensions of "
    "every head permuted, so that attention is no longer what was learned",
)
def identity_and_order(seed: int) -> Measured:
    """Forty lists of ten nouns; ratio of median surprisal to that of the same nouns read first, mean over lists."""
    lm = models.load("smollm2")
    lists, others = _lists(seed), _lists(seed + 1000)
    dice = np.random.default_rng(seed)
    shuffled = [list(dice.permutation(words)) for words in lists]
    found = {
        name: _repeat(lm, lists, earlier, PAUSE, seed)
        for name, earlier in (("repeat", lists), ("permuted", shuffled), ("novel", _apart(others, lists)))
    }
    found["scrambled"] = _repeat(_scrambled(seed), lists, lists, PAUSE, seed)
    means = {name: x.mean() for name, x in found.items()}
    return Measured(
        values={name: means[name] for name in ("repeat", "permuted")},
        null={name: means[name] for name in ("novel", "scrambled")},
        n=LISTS,
        interval={name: _bootstrap(x, seed) for name, x in found.items()},
        figure=xr.DataArray(
            list(means.values()), {"earlier list": list(means)}, ["earlier list"], name="repeat surprisal"
        ),
        note="The scrambled model's lists are compared with its own first reading.",
    )


@claim(
    says="Transformers retrieve individual tokens across long delays and from long lists",
    where="abstract; section 4 (list length, intervening text)",
    tier="small",
    subject="smollm2",
    expect="delayed <= 0.4 and short_list <= 0.4 and long_list <= 0.4 and delayed_novel >= delayed + 0.4",
    direction="delayed < delayed_novel and long_list < delayed_novel",
    null="another list of nouns before the same long delay",
)
def across_delays(seed: int) -> Measured:
    """The same lists after about 120 tokens of another story, and lists of three and of twenty nouns after a short one."""
    lm = models.load("smollm2")
    lists = _lists(seed)
    found = {
        "delayed": _repeat(lm, lists, lists, DELAY, seed),
        "short_list": _repeat(lm, _lists(seed, 3), _lists(seed, 3), PAUSE, seed),
        "long_list": _repeat(lm, _lists(seed, 20), _lists(seed, 20), PAUSE, seed),
    }
    novel = _repeat(lm, lists, _apart(_lists(seed + 1000), lists), DELAY, seed)
    bars = {**{name: x.mean() for name, x in found.items()}, "delayed_novel": novel.mean()}
    return Measured(
        values={name: x.mean() for name, x in found.items()},
        null={"delayed_novel": novel.mean()},
        n=LISTS,
        interval={name: _bootstrap(x, seed) for name, x in found.items()},
        figure=xr.DataArray(list(bars.values()), {"condition": list(bars)}, ["condition"], name="repeat surprisal"),
    )


def _lists(seed: int, length: int = LENGTH) -> list[list[str]]:
    dice = np.random.default_rng(seed)
    return [list(dice.choice(NOUNS, length, replace=False)) for _ in range(LISTS)]


def _apart(others: Sequence[Sequence[str]], lists: Sequence[Sequence[str]]) -> list[list[str]]:
    """Each other list, with nouns of the list it stands before replaced by nouns that neither has."""
    found = []
    for other, words in zip(others, lists):
        free = iter([noun for noun in NOUNS if noun not in other and noun not in words])
        found.append([next(free) if noun in words else noun for noun in other])
    return found


def _text(words: Sequence[str]) -> str:
    return f" {', '.join(words)}."


def _repeat(
    lm: LM, lists: Sequence[Sequence[str]], earlier: Sequence[Sequence[str]], pause: str, seed: int
) -> np.ndarray:
    """(list,) median surprisal of a list's nouns after the earlier one, over that of the same nouns read first.

    Commas and the full stop are left out: they are as easy the first time.
    """
    found = verbatim_recall.measure(
        lm, [_text(w) for w in lists], earlier=[_text(w) for w in earlier], opening=OPENING, between=pause, seed=seed
    )
    noun = np.array([[token.strip(" ,.") != "" for token in row] for row in found.text.values])
    ratio = [
        np.median(found.surprisal.values[i][noun[i]]) / np.median(found["first"].values[i][noun[i]])
        for i in range(len(lists))
    ]
    return np.array(ratio)


@cache
def _scrambled(seed: int) -> LM:
    """SmolLM2 whose key heads have their dimensions permuted: as many numbers, no longer matched to the queries."""
    lm = models.load("smollm2")
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lm.layout.layers[""]:
            weight = layer.self_attn.k_proj.weight
            heads = weight.unflatten(0, (-1, lm.dims.head_dim))
            order = torch.randperm(lm.dims.head_dim, generator=dice)
            weight.copy_(heads[:, order].flatten(0, 1))
    return lm


def _bootstrap(x: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of the mean over lists."""
    dice = np.random.default_rng(seed)
    means = dice.choice(x, (2000, len(x))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
