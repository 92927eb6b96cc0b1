"""Brain-Like Language Processing via a Shallow Untrained Multihead Attention Network.

AlKhamissi, Tuckute, Bosselut and Schrimpf, 2024. arXiv:2406.15109.
Claim: units of a language model that are found as the language network of a brain is found,
    respond to sentences, word lists, jabberwocky and non-words as that network does; they do so in
    a network that was never trained.
Methods: neurons.localiser
Protocol: GPT-2 and Llama 2 7B, trained and with five starts untrained, and the authors' network
    of one attention layer; 240 sentences and 240 lists of non-words of Fedorenko et al. (2010) to
    localise, their other stimuli to judge; then five recordings of brains and reading times.
What would change our mind: trained models whose localised units respond to word lists as to
    sentences once every text has as many tokens; untrained twins in which they do not.
What the authors may object: our sentences are of novels and our non-words made of syllables, theirs
    are the stimuli that people lay in the scanner with; theirs are cut to twelve tokens wherever
    that falls, ours end with a word; units here are of the residual stream, theirs what norms,
    attention and MLPs put out; responses are in deviations, theirs as they are; our untrained
    networks have all layers of the trained ones, theirs has one, without MLP.

The authors' code was read for how units are localised (the last token, 240 texts of each kind, all
in lower case, at most twelve tokens) and profiled; it holds neither the t-test nor how many units
their figures show, which the specification has: Welch's t, the upper 1 %.

Not tested: what the abstract says of recordings and reading times, which cannot be had here, and of
language modelling on top of the untrained encoder, which waits for that encoder.

Who else would pass: token counts (all texts have twelve), the number of pieces of the last word
alone (`embedding`: units localised where a token knows nothing of its neighbours), large
units (`largest`), and any units at all (`random`, `shuffled`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from scipy import stats

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.lab import data, stimuli
from stratoscope.models import LM
from stratoscope.neurons import localiser

LOCALISE, ITEMS = 120, 60  # texts of a kind that find the units, and that judge them
NETS, DRAWS = 5, 20
EMBEDDING = "layers.0.resid_pre"
Text = Mapping[str, Sequence[str]]


class Profile(NamedTuple):
    """Mean responses of some units, in deviations: `own` (item,) by condition; of the nulls the
    difference between sentences and non-words, by name."""

    own: dict[str, np.ndarray]
    random: list[float]
    shuffled: list[float]
    largest: float
    embedding: float  # sentences less word lists, by units that know the last token alone
    top_t: float  # of the chosen units, on the texts that chose them
    shuffled_top_t: list[float]


@claim(
    says="The localiser is Welch's t, and finds a unit that differs little but always before one "
    "that differs much and by chance",
    where="the authors' code (localisation); the test itself is in none of its files",
    tier="identity",
    subject="random samples",
    expect="worst <= 0.000001 and planted_rank == 0 and wrong_rank >= 1",
    null={"wrong_rank": "the planted unit's place by the bare difference of means"},
)
def the_planted_unit_is_first(seed: int) -> Measured:
    """Forty samples of 200 units; one is higher by a tenth in half of them and varies by a
    hundredth, ten vary thirty times as much as the others."""
    generator = torch.Generator().manual_seed(seed)
    one, two = torch.randn(2, 20, 200, generator=generator, dtype=torch.float64)
    for x, shift in ((one, 0.1), (two, 0.0)):
        x[:, :10] *= 30
        x[:, 10] = 0.01 * x[:, 10] + shift
    t, away = localiser.welch(one, two), (one.mean(dim=0) - two.mean(dim=0)).abs()
    expected = stats.ttest_ind(one, two, axis=0, equal_var=False).statistic
    return Measured(
        values={
            "worst": np.abs(t.numpy() - expected).max(),
            "planted_rank": int((t > t[10]).sum()),
        },
        null={"wrong_rank": int((away > away[10]).sum())},
        n=len(one) + len(two),
    )


@claim(
    says="Localised units respond as a brain's language network does: most to sentences, less to "
    "word lists and jabberwocky, least to non-words",
    where="abstract (similar response profiles under the same experimental conditions)",
    read="authors' code",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="60 texts of each condition",
    valid="top_t > shuffled_top_t_bound",
    expect="sentence_words_low > 0 and sentence_jabberwocky_low > 0 and words_nonwords_low > 0 and "
    "sentence_nonwords_low >= 2 * max(random_bound, 0) and sentence_nonwords_low > shuffled_bound "
    "and sentence_nonwords_low > largest",
    direction="sentence_words > 0 and sentence_nonwords > max(random, 0)",
    we_add="word order counts for more than where a token knows nothing of its neighbours",
    we_expect="sentence_words_low > embedding",
    null={
        "random": "sentences less non-words in as many units, drawn at random",
        "shuffled": "the same in units localised on shuffled labels",
        "largest": "the same in as many units, the largest in size",
        "shuffled_top_t": "t of units localised on shuffled labels",
        "embedding": "sentences less word lists in units of the embedding alone",
    },
    thresholds="2: the specification's; 0: the paper's statement is an order; the least difference "
    "that would matter is twice what random units show",
)
def a_trained_model_has_the_profile(lm: LM, seed: int) -> Measured:
    """1 % of the units of the residual stream, localised on 120 sentences and 120 lists of
    non-words; their response to 60 other texts of each condition, from other novels. Texts of a
    condition belong to no pair; the differences pair them as they come."""
    profile = _profile(lm, _texts(lm, seed), seed)
    return Measured(
        values={"top_t": profile.top_t},
        units=_differences(profile),
        null={
            "random": profile.random,
            "shuffled": profile.shuffled,
            "largest": profile.largest,
            "shuffled_top_t": profile.shuffled_top_t,
            "embedding": profile.embedding,
        },
        n=ITEMS,
        figure=_figure([profile]),
    )


@claim(
    says="Localised units of a network that was never trained respond as a language network does",
    where="abstract (untrained models; the localised units of the untrained encoder)",
    read="authors' code",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="5 untrained networks",
    valid="top_t > shuffled_top_t_bound",
    expect="sentence_words_low > 0 and sentence_jabberwocky_low > 0 and words_nonwords_low > 0 and "
    "sentence_nonwords_low >= 2 * max(random_bound, 0) and sentence_nonwords_low > shuffled_bound "
    "and sentence_nonwords_low > largest",
    direction="sentence_words > 0 and sentence_nonwords > max(random, 0)",
    we_add="word order counts for more than where a token knows nothing of its neighbours",
    we_expect="sentence_words_low > embedding",
    null={
        "random": "sentences less non-words in as many units, drawn at random",
        "shuffled": "the same in units localised on shuffled labels",
        "largest": "the same in as many units, the largest in size",
        "shuffled_top_t": "t of units localised on shuffled labels",
        "embedding": "sentences less word lists in units of the embedding alone",
    },
    thresholds="2: the specification's; 0: the paper's statement is an order; the least difference "
    "that would matter is twice what random units show",
)
def an_untrained_model_has_the_profile(lm: LM, seed: int) -> Measured:
    """The same in five untrained twins of the model (`models.untrained`), which are the units: of
    each the mean over its texts. The null's draws are shared out among them, each of one twin, so
    that a mean of five has to pass what one may show by chance."""
    texts = _texts(lm, seed)
    every = [
        _profile(models.untrained(lm, seed=number), texts, number, draws=DRAWS // NETS)
        for number in range(NETS * seed, NETS * (seed + 1))
    ]
    rows = [_differences(profile) for profile in every]
    return Measured(
        values={"top_t": np.mean([profile.top_t for profile in every])},
        units={name: [row[name].mean() for row in rows] for name in rows[0]},
        null={
            "random": [draw for profile in every for draw in profile.random],
            "shuffled": [draw for profile in every for draw in profile.shuffled],
            "largest": np.mean([profile.largest for profile in every]),
            "shuffled_top_t": [draw for profile in every for draw in profile.shuffled_top_t],
            "embedding": np.mean([profile.embedding for profile in every]),
        },
        n=NETS,
        figure=_figure(every),
    )


def _profile(lm: LM, texts: Sequence[Text], seed: int, draws: int = DRAWS) -> Profile:
    """Units localised on the first texts, judged on the second."""
    first, second = texts
    localised = localiser.measure(
        lm, first["sentence"], other=first["nonwords"], draws=draws, seed=seed
    )
    x = {name: localiser.states(lm, rows) for name, rows in second.items()}
    chosen, t = torch.tensor(localised.chosen.values), torch.tensor(localised.t.values)
    null = torch.tensor(localised["null"].values)
    share = localised.chosen.values.mean()
    generator = torch.Generator().manual_seed(seed)
    random = [localiser.top(torch.rand(t.shape, generator=generator), share) for _ in range(draws)]
    shuffled = [localiser.top(one, share) for one in null]
    size = torch.cat([*x.values()]).abs().mean(dim=0)

    def apart(units: torch.Tensor) -> float:
        """Sentences less non-words."""
        means = [
            localiser.response(x[name], localised, units).mean()
            for name in ("sentence", "nonwords")
        ]
        return float(means[0] - means[1])

    return Profile(
        own={name: localiser.response(rows, localised).numpy() for name, rows in x.items()},
        random=[apart(units) for units in random],
        shuffled=[apart(units) for units in shuffled],
        largest=apart(localiser.top(size, share)),
        embedding=_last_token_alone(lm, first, second),
        top_t=float(t[chosen].mean()),
        shuffled_top_t=[float(one[units].mean()) for one, units in zip(null, shuffled)],
    )


def _last_token_alone(lm: LM, first: Text, second: Text) -> float:
    """Sentences less word lists, in units localised where a token knows nothing of the others."""
    localised = localiser.measure(
        lm, first["sentence"], other=first["nonwords"], draws=0, site=EMBEDDING
    )
    sentence, words = (
        localiser.response(localiser.states(lm, second[name], site=EMBEDDING), localised)
        for name in ("sentence", "words")
    )
    return float(sentence.mean() - words.mean())


def _differences(profile: Profile) -> dict[str, np.ndarray]:
    pairs = (
        ("sentence", "words"),
        ("sentence", "jabberwocky"),
        ("words", "nonwords"),
        ("sentence", "nonwords"),
    )
    return {f"{one}_{two}": profile.own[one] - profile.own[two] for one, two in pairs}


def _figure(every: Sequence[Profile]) -> xr.DataArray:
    means = [np.mean([p.own[name].mean() for p in every]) for name in stimuli.CONDITIONS]
    return xr.DataArray(
        means, {"condition": list(stimuli.CONDITIONS)}, ["condition"], name="response"
    )


def _texts(lm: LM, seed: int) -> list[dict[str, list[str]]]:
    """Stimuli that localise and stimuli that judge, from novels that have no passage in common."""
    lambada = data("lambada")
    return [
        stimuli.conditions(lm.tokenizer, _sentences(part), n, seed=seed)
        for part, n in ((lambada.train, LOCALISE), (lambada.test, ITEMS))
    ]


def _sentences(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Whole sentences of ten words or more, without quotes or numbers."""
    parts = [text for row in rows for text in re.split(r"(?<=[.!?])\s+", row["text"])]
    plain = [text for text in parts if re.fullmatch(r"[A-Z][A-Za-z ,;:'\u2019-]+[.!?]", text)]
    return [text for text in plain if len(text.split()) >= 10]
