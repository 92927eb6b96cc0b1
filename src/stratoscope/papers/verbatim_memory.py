"""Characterizing Verbatim Short-Term Memory in Neural Language Models.

Armeni, Honey and Linzen, 2022. arXiv:2210.13569.
Claim: transformers retrieve which nouns stood in a list and in what order, over long delays,
    through learned attention; a recurrent network keeps a coarse gist that decays and knows no
    order.
Methods: tokens.verbatim_recall, editing.scramble_keys
Protocol: GPT-2 and the authors' own transformers of several depths, and their LSTM, trained on the
    same text; their lists of nouns, arbitrary and semantic, the first token of each list left out;
    attention scrambled after training.
What would change our mind: a list read again that is no less of a surprise than in another order,
    or than after another list; a transformer with scrambled keys that recalls as well; a recurrent
    network whose gist knows the order or outlasts a sentence.
What the authors may object: our lists are drawn from forty nouns of ours and none is semantic; our
    ratio is to the same nouns read first, theirs to the first list of the same story; our LSTM is
    far smaller than theirs and read far less, so that three nouns and no story were needed to see
    any gist; transformer and LSTM were not trained on the same text. We read the abstract alone.

The paper's vignette is used: someone writes a list down, does something else, and reads the list
again. Its x2 / x1 takes the first list of the same story as x1; here x1 is the same nouns read
first, which for an unchanged list is the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch.nn.utils.rnn import pad_sequence

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.editing import scramble_keys
from stratoscope.lab import make, planted
from stratoscope.lab.miniatures import tiny_lstm
from stratoscope.lab.miniatures.tiny_lstm import TinyLSTM
from stratoscope.maths.resample import interval
from stratoscope.models import LM
from stratoscope.tokens import verbatim_recall

OPENING = "Mary wrote down a list of words:"
PAUSE = (
    " After the meeting, she took a break and had a cup of coffee. When she got back, she "
    "read "
    "the list again:"
)
DELAY = """ After the meeting, she walked home along the river. It had rained in the morning, and
the streets were still wet. At the corner she met an old friend who told her about his new job in
another city. They talked for a while about the people they both knew, about the weather and about
the summer, and then he had to catch his train. At home she cooked some soup, fed the cat and
watered the plants. In the evening she sat down at the table and turned on the light. There she read
the list again:""".replace("\n", " ")
NOUNS = """window patience notebook river engine candle theory garden soldier kitchen mirror justice
basket winter doctor island needle music castle shadow ticket farmer bottle memory bridge hammer
market poetry jacket rabbit signal temple mountain pencil danger blanket harbor planet dinner monkey
treaty""".split()
LISTS, LENGTH = 20, 10
# the recurrent network is quick, and what it remembers is little
LSTM_LISTS, AT_ONCE = 600, " Then she read:"


@claim(
    says="A list that stands in the context is read again with little surprisal",
    where="abstract (paradigm)",
    tier="identity",
    subject="planted.induction",
    expect="repeat < 0.5 * unrelated",
    null={"unrelated": "the same list after random words in place of itself"},
)
def a_planted_copier_recalls(seed: int) -> Measured:
    """A hand-built induction circuit reads eight words twice."""
    p = planted.induction(seed)
    lm = models.wrap(p.model, p.tokenizer)
    words = [word for word in p.tokenizer.get_vocab() if word.isalpha()][:8]
    found = verbatim_recall.measure(lm, " ".join(words), opening=words[-1], seed=seed)
    return Measured(
        values={"repeat": found.repeat.item()}, null={"unrelated": found.repeat_null.item()}, n=1
    )


@claim(
    says="Transformers retrieve both the identity and the order of the nouns, through learned "
    "attention",
    where="abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m", "qwen2.5-coder-0.5b"),
    n="20 lists",
    expect="repeat_high <= 0.4 and permuted_low >= repeat + 0.15 and novel_low >= repeat + 0.4 and "
    "scrambled_low >= repeat + 0.4",
    direction="repeat_high < permuted_low and permuted < novel and repeat_high < scrambled_low",
    null={
        "novel": "another list of nouns stood there",
        "scrambled": "the same list, read by the model with the key dimensions of every head "
        "permuted, so that attention is no longer what was learned",
    },
    thresholds="0.4 and 0.15: the ledger's",
)
def identity_and_order(lm: LM, seed: int) -> Measured:
    """Twenty lists of ten nouns; ratio of median surprisal to that of the same nouns read first,
    each list's first token left out as in the paper; mean over lists. The scrambled model
    (`editing.scramble_keys`) is compared with its own first reading."""
    lists, others = _lists(seed), _lists(seed + 1000)
    generator = np.random.default_rng(seed)
    shuffled = [list(generator.permutation(words)) for words in lists]
    found = {
        "repeat": _repeat(lm, lists, lists, PAUSE),
        "permuted": _repeat(lm, lists, shuffled, PAUSE),
        "novel": _repeat(lm, lists, _apart(others, lists), PAUSE),
    }
    with scramble_keys.edit(lm, seed=seed):
        found["scrambled"] = _repeat(lm, lists, lists, PAUSE)
    means = {name: x.mean() for name, x in found.items()}
    return Measured(
        null={name: means[name] for name in ("novel", "scrambled")},
        n=LISTS,
        units={name: found[name] for name in ("repeat", "permuted")},
        interval={name: _interval(found[name]) for name in ("novel", "scrambled")},
        figure=xr.DataArray(
            list(means.values()),
            {"earlier list": list(means)},
            ["earlier list"],
            name="repeat surprisal",
        ),
    )


@claim(
    says="Transformers retrieve individual tokens across long delays and from long lists",
    where="abstract (arbitrary delays); list length not checked",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m", "qwen2.5-coder-0.5b"),
    n="20 lists",
    expect="delayed_high <= 0.4 and short_list_high <= 0.4 and long_list_high <= 0.4 and "
    "delayed_novel_low >= delayed + 0.4",
    direction="delayed_high < delayed_novel and long_list_high < delayed_novel",
    null={"delayed_novel": "another list of nouns before the same long delay"},
    thresholds="0.4: the ledger's",
)
def across_delays(lm: LM, seed: int) -> Measured:
    """The same lists after about 120 tokens of another story, and lists of three and of twenty
    nouns after a short one."""
    lists, short, long = _lists(seed), _lists(seed, 3), _lists(seed, 20)
    found = {
        "delayed": _repeat(lm, lists, lists, DELAY),
        "short_list": _repeat(lm, short, short, PAUSE),
        "long_list": _repeat(lm, long, long, PAUSE),
    }
    novel = _repeat(lm, lists, _apart(_lists(seed + 1000), lists), DELAY)
    bars = {**{name: x.mean() for name, x in found.items()}, "delayed_novel": novel.mean()}
    return Measured(
        null={"delayed_novel": novel.mean()},
        n=LISTS,
        units=found,
        interval={"delayed_novel": _interval(novel)},
        figure=xr.DataArray(
            list(bars.values()), {"condition": list(bars)}, ["condition"], name="repeat surprisal"
        ),
    )


@claim(
    says="A recurrent network keeps less of a list, no order of it, and loses it "
    "within a short delay",
    where="abstract",
    read="abstract",
    tier="small",
    subject="tiny-lstm",
    kind="miniature",
    n="600 lists",
    valid="gist_low >= 0.02",
    expect="gist_low > untrained_high and gist_high < 0.4 and order_high < 0.5 * gist and "
    "gist_delayed_high < 0.5 * gist",
    direction="gist > untrained and order < gist and gist_delayed < gist",
    null={"untrained": "the gist of the same network with fresh weights"},
    thresholds="0.02, the smallest gist that would matter: ours; 0.4, the least asked of the"
    " transformer, and half: the ledger's",
)
def a_recurrent_network_keeps_a_gist(seed: int) -> Measured:
    """600 lists of three nouns, read again at once, and after the story's pause (delayed). gist:
    how much more a list surprises after another list than after itself (gist_low: the lower end of
    its interval); order: after itself in another order. 0.4 is the least that is asked of the
    transformer. Three nouns and no story were chosen on seed 7, where ten nouns left no gist
    whatever the delay: this network is far smaller than the paper's, and has seen far less text.
    Each seed trains a network of its own. Each list's first token is left out."""
    net, tokenizer = tiny_lstm.load(make("tiny-lstm", seed=seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = TinyLSTM(**net.config).eval()
    lists = _lists(seed, 3, LSTM_LISTS)
    others = _apart(_lists(seed + 1000, 3, LSTM_LISTS), lists)
    generator = np.random.default_rng(seed)
    shuffled = [list(generator.permutation(words)) for words in lists]
    conditions = {"repeat": lists, "permuted": shuffled, "novel": others}
    now, later = (
        {
            name: _recurrent_repeat(net, tokenizer, lists, earlier, pause)
            for name, earlier in conditions.items()
        }
        for pause in (AT_ONCE, PAUSE)
    )
    blank = [
        _recurrent_repeat(fresh, tokenizer, lists, earlier, AT_ONCE) for earlier in (others, lists)
    ]
    gist, order, delayed = (
        now["novel"] - now["repeat"],
        now["permuted"] - now["repeat"],
        later["novel"] - later["repeat"],
    )
    return Measured(
        values={
            "gist": gist.mean(),
            "order": order.mean(),
            "gist_delayed": delayed.mean(),
            "repeat": now["repeat"].mean(),
        },
        null={"untrained": (blank[0] - blank[1]).mean()},
        n=LSTM_LISTS,
        interval={
            "gist": _interval(gist),
            "order": _interval(order),
            "gist_delayed": _interval(delayed),
            "untrained": _interval(blank[0] - blank[1]),
        },
        figure=xr.DataArray(
            [[x.mean() for x in found.values()] for found in (now, later)],
            {"delay": ["at once", "after the pause"], "earlier list": list(now)},
            ["delay", "earlier list"],
            name="repeat surprisal",
        ),
    )


def _lists(seed: int, length: int = LENGTH, count: int = LISTS) -> list[list[str]]:
    generator = np.random.default_rng(seed)
    return [list(generator.choice(NOUNS, length, replace=False)) for _ in range(count)]


def _apart(others: Sequence[Sequence[str]], lists: Sequence[Sequence[str]]) -> list[list[str]]:
    """Each other list, with nouns of the list it stands before replaced by nouns that neither
    has."""
    found = []
    for other, words in zip(others, lists):
        free = iter([noun for noun in NOUNS if noun not in other and noun not in words])
        found.append([next(free) if noun in words else noun for noun in other])
    return found


def _text(words: Sequence[str]) -> str:
    return f" {', '.join(words)}."


def _repeat(
    lm: LM, lists: Sequence[Sequence[str]], earlier: Sequence[Sequence[str]], pause: str
) -> np.ndarray:
    """(list,) median surprisal of a list's nouns after the earlier one, over that of the same nouns
    read first; commas and each list's first token are left out."""
    found = verbatim_recall.measure(
        lm,
        [_text(w) for w in lists],
        earlier=[_text(w) for w in earlier],
        opening=OPENING,
        between=pause,
        words=True,
        skip=1,
        null=False,
    )
    return found.repeat.values


@torch.no_grad()
def _recurrent_repeat(
    net: TinyLSTM,
    tokenizer: Any,
    lists: Sequence[Sequence[str]],
    earlier: Sequence[Sequence[str]],
    pause: str,
) -> np.ndarray:
    """`_repeat` of the recurrent network, which is no Hugging Face model."""

    def middle(before: Sequence[str]) -> np.ndarray:
        """(list,) median bits of each list's nouns after what stands before it."""
        told = [tokenizer(_text(words))["input_ids"] for words in lists]
        rows = [torch.tensor(tokenizer(old)["input_ids"] + text) for old, text in zip(before, told)]
        logits = net(pad_sequence(rows, batch_first=True))  # what follows a row cannot reach it
        nouns = verbatim_recall.counted(tokenizer, told, words=True, skip=1)
        bits = [
            verbatim_recall.bits(x[: len(row)], row)[-len(text) :]
            for x, row, text in zip(logits, rows, told)
        ]
        return np.array([x[noun[: len(x)]].median() for x, noun in zip(bits, nouns)])

    return middle([OPENING + _text(old) + pause for old in earlier]) / middle(
        [OPENING] * len(lists)
    )


def _interval(x: np.ndarray) -> tuple[float, float]:
    """Of the mean over lists, which may be more than a verdict keeps one by one."""
    found = interval(x)
    return found.low, found.high
