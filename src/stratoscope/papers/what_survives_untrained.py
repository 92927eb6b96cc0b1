"""What survives an untrained control: six papers' measures on a model and on its untrained twin.

Ours, 2026.
Claim: whether what a paper measures in a trained model is made by training, and not by the
    architecture alone: whether the same model with the weights that training starts from shows less
    than half of it.
Methods: layers.module_importance, neurons.activation_sparsity, tokens.verbatim_recall,
    layers.concept_depth, tokens.transition_loss, neurons.token_neurons
Across: llm-drop, lazy-neuron, verbatim-memory, concept-depth, function-tokens, neuron-lm-head
Protocol: the models of the six papers and twins of theirs, made by the authors' own start where it
    is published, on the authors' texts; 20 twins each, so that the worst of them is a bound.
    `stratoscope claim what-survives-untrained --model YOUR/MODEL` runs the small one.
What would change our mind: twins of another start, or of a larger model, in which an effect that
    is lost here is kept by half, or one that is kept here is lost.
What the authors may object: none of them says that the untrained model is at zero, and half is our
    line; neurons that are gated and smooth are silent by a threshold of ours, where the paper's are
    exactly zero; a start with another deviation than the config's is another twin; words clamped
    here are 16, each by one neuron.

One rule for all: an effect whose zero means that there is none is measured text by text (list by
list, word by word) in the model and in three untrained twins (`models.untrained`): `kept` is the
twins' share of it. Below half, training made it; at half or more, the architecture and the input
did. Where the trained model does not show the effect there is nothing to be kept: no test.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.engine.intervene import replaced, scaled
from stratoscope.engine.sweep import sweep
from stratoscope.lab import data, planted
from stratoscope.layers import concept_depth, module_importance
from stratoscope.maths.resample import interval
from stratoscope.models import LM
from stratoscope.neurons import activation_sparsity, token_neurons
from stratoscope.papers import _read_twice
from stratoscope.tokens import transition_loss, verbatim_recall

TWINS = 3
TEXTS, LISTS, REVIEWS = 16, 12, 160
LETTERS, COUNTED = 300, 300_000  # of a text; of the corpus in which function tokens are counted
FIRST = 2  # layers 0 and 1 are special in every model
WORDS = "dog horse tree river sea winter water bread doctor king music book gold war train red"
CHOOSE = ("The best thing about it is the", "I would like to talk about")
TEST = ("He told me a story of a", "It was all because of the", "In the picture you can see a")
CANDIDATES, VALUE = 4, 20.0  # neurons tried for each word, and at which values (either sign)

Effect = Callable[[LM], np.ndarray]  # the effect of each unit: (unit,)


@claim(
    says="A planted circuit recalls a list, and its untrained twin does not",
    where="what this page rests on",
    tier="identity",
    subject="planted.induction",
    expect="kept < 0.1 and untrained < 0.1 and effect > 0.9",
    null={"untrained": "the recall of its twins"},
)
def a_planted_circuit_does_not_survive(seed: int) -> Measured:
    """A hand-built induction circuit reads eight words twice, five lists of them."""
    p = planted.induction(seed)
    lm = models.wrap(p.model, p.tokenizer)
    words = np.array([word for word in p.tokenizer.get_vocab() if word.isalpha()])
    generator = np.random.default_rng(seed)
    lists = [" ".join(generator.permutation(words)[:8]) for _ in range(5)]

    def recall(lm: LM) -> np.ndarray:
        found = verbatim_recall.measure(lm, lists, opening=str(words[0]), seed=seed)
        return 1 - found.repeat.values

    return _judged(lm, seed, recall)


@claim(
    says="That attention turns the stream less than MLPs do is made by training",
    where="llm-drop: abstract; section 3.2, figure 3",
    read="authors' code",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="16 texts",
    valid="effect_low > 0",
    expect="kept_high < 0.5 and effect_low > untrained_high",
    direction="effect_low > untrained_high",
    null={"untrained": "the effect in three untrained twins"},
    thresholds="half: ours, the page's one rule",
)
def attention_turns_less(lm: LM, seed: int) -> Measured:
    """How much further an MLP turns the residual stream than attention does: the difference of
    1 - cosine, mean over layers from 2 on and the tokens of a text."""
    texts = _texts(seed)

    def effect(lm: LM) -> np.ndarray:
        found = module_importance.measure(lm, texts).isel(layer=slice(FIRST, None))
        return (found.mlp - found.attention).mean("layer").values

    return _judged(lm, seed, effect)


@claim(
    says="That few neurons speak at a time is made by training",
    where="lazy-neuron: abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="16 texts",
    valid="effect_low > 0",
    expect="kept_high < 0.5 and effect_low > untrained_high",
    direction="effect_low > untrained_high",
    null={"untrained": "the effect in three untrained twins"},
    thresholds="half: ours, the page's one rule",
)
def few_neurons_speak(lm: LM, seed: int) -> Measured:
    """Share of neurons that are silent: below a tenth of the token's largest activation, mean over
    layers and the tokens of a text. 0 would be a layer in which all speak alike."""
    texts = _texts(seed)
    return _judged(
        lm,
        seed,
        lambda lm: 1 - activation_sparsity.measure(lm, texts).above.mean("layer").values,
    )


@claim(
    says="That a list in the context is read again with little surprisal is made by training",
    where="verbatim-memory: abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="12 lists",
    valid="effect_low > 0",
    expect="kept_high < 0.5 and effect_low > untrained_high",
    direction="effect_low > untrained_high",
    null={"untrained": "the effect in three untrained twins"},
    thresholds="half: ours, the page's one rule",
)
def a_list_is_recalled(lm: LM, seed: int) -> Measured:
    """1 less the median surprisal of ten nouns read again over that of the same nouns read first;
    each list's first token is left out."""
    texts = _read_twice.lists(LISTS, seed)
    return _judged(lm, seed, lambda lm: _read_twice.recall(lm, texts, seed))


@claim(
    says="That a straight line can tell good reviews from bad is made by training",
    where="concept-depth: abstract (emotional tasks)",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="160 texts",
    valid="effect_low > 0",
    expect="kept_high < 0.5 and effect_low > untrained_high",
    direction="effect_low > untrained_high",
    null={"untrained": "the effect in three untrained twins"},
    thresholds="half: ours, the page's one rule",
)
def a_line_tells_reviews_apart(lm: LM, seed: int) -> Measured:
    """How often a held-out probe of the last token's stream is right, above the half that guessing
    gives: mean over all depths but the embedding, on film reviews, as many bad as good."""
    texts, kinds = _reviews(seed)

    def effect(lm: LM) -> np.ndarray:
        correct = concept_depth.fit(lm, texts, labels=kinds, seed=seed).correct
        return correct[:, 1:].mean(dim=1).numpy() - 0.5

    return _judged(lm, seed, effect)


@claim(
    says="That content words are harder after function tokens than after content tokens is made by "
    "training",
    where="function-tokens: abstract; section 4.3, figure 9",
    read="full text",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="16 texts",
    valid="effect_low > 0",
    expect="kept_high < 0.5 and effect_low > untrained_high",
    direction="effect_low > untrained_high",
    null={"untrained": "the effect in three untrained twins"},
    thresholds="half: ours, the page's one rule",
)
def content_after_function_is_hard(lm: LM, seed: int) -> Measured:
    """Nats of a prediction function->content less those of content->content, text by text, among
    predictions that begin a word."""
    texts = _texts(seed)
    ids = lm.tokenizer("".join(data("enwik8").test)[:COUNTED], add_special_tokens=False)
    counts = torch.bincount(torch.tensor(ids["input_ids"]), minlength=lm.dims.vocab)
    function = transition_loss.function_tokens(counts).tolist()

    def effect(lm: LM) -> np.ndarray:
        found = transition_loss.measure(lm, texts, function=function, words=True, draws=1)
        after = [
            found.surprisal.where(found.kind == f"{kind}->content").mean("position").values
            for kind in ("function", "content")
        ]
        return after[0] - after[1]

    return _judged(lm, seed, effect)


@claim(
    says="That a neuron found by its up weights raises the token it is read as is made by training",
    where="neuron-lm-head: abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2",),
    n="16 words",
    valid="effect_low > 0",
    expect="kept_high < 0.5 and effect_low > untrained_high",
    direction="effect_low > untrained_high",
    null={"untrained": "the effect in three untrained twins"},
    thresholds="half: ours, the page's one rule",
)
def up_weights_name_a_token(lm: LM, seed: int) -> Measured:
    """Log gain in the token's probability when its neuron is clamped, less that of a random neuron
    of the same layer at the same value. Of the four neurons that come first, at +20 and -20, the
    best on two prompts is judged on three others."""
    return _judged(lm, seed, lambda lm: _clamped(lm, seed, "up"))


@claim(
    says="That a neuron found by its down weights raises the token it is read as is made by "
    "training",
    where="neuron-lm-head: our positive control, which its abstract does not name",
    read="abstract",
    tier="small",
    side=True,
    subjects=("smollm2",),
    n="16 words",
    valid="effect_low > 0",
    expect="kept_high < 0.5 and effect_low > untrained_high",
    direction="effect_low > untrained_high",
    null={"untrained": "the effect in three untrained twins"},
    thresholds="half: ours, the page's one rule",
)
def down_weights_name_a_token(lm: LM, seed: int) -> Measured:
    """The same with what a neuron writes: its down weights and the head stand next to each other
    in any model, trained or not."""
    return _judged(lm, seed, lambda lm: _clamped(lm, seed, "down"))


def _judged(lm: LM, seed: int, effect: Effect) -> Measured:
    """The effect in the model and in its twins, and the share that the twins keep, unit by unit."""
    trained = effect(lm)
    twins = np.stack([effect(models.untrained(lm, seed=TWINS * seed + n)) for n in range(TWINS)])
    blank = interval(twins.mean(axis=0), seed=seed)
    kept = interval(twins.mean(axis=0), trained, seed=seed)
    each = ", ".join(f"{twin.mean():.3g}" for twin in twins)
    return Measured(
        values={"kept": kept.value},
        units={"effect": trained},
        null={"untrained": blank.value},
        interval={"kept": (kept.low, kept.high), "untrained": (blank.low, blank.high)},
        n=len(trained),
        note=f"The effect in each twin: {each}. {kept.note}".strip(),
    )


def _texts(seed: int) -> list[str]:
    """Beginnings of held-out paragraphs of Wikipedia."""
    texts = [text[:LETTERS] for text in data("enwik8").test if len(text) > LETTERS]
    return random.Random(seed).sample(texts, TEXTS)


def _reviews(seed: int) -> tuple[list[str], list[int]]:
    """Film reviews of at most twenty words, as many bad (0) as good (1)."""
    rows = [row for row in data("sst2").all if 4 <= len(row["text"].split()) <= 20]
    generator, texts = random.Random(seed), []
    for kind in (0, 1):
        same = [row["text"] for row in rows if row["label"] == kind]
        texts += [f"{text.rstrip(' .')}." for text in generator.sample(same, REVIEWS // 2)]
    return texts, [0] * (REVIEWS // 2) + [1] * (REVIEWS // 2)


def _clamped(lm: LM, seed: int, side: token_neurons.Side) -> np.ndarray:
    """Log gain of each word's token by its neuron, less that of a random one: (word,)."""
    generator = random.Random(seed)
    ids = torch.tensor([lm.tokenizer(f" {word}")["input_ids"][0] for word in WORDS.split()])
    layers, neurons, _ = token_neurons.search(lm, ids, side=side, top=CANDIDATES)
    gains = []
    for token, *found in zip(ids.tolist(), layers.tolist(), neurons.tolist()):
        tried = [(*unit, value) for unit in zip(*found) for value in (VALUE, -VALUE)]
        layer, neuron, value = tried[int(_gains(lm, CHOOSE, tried, token).argmax())]
        other = (layer, generator.randrange(lm.dims.neurons), value)
        own, chance = _gains(lm, TEST, [(layer, neuron, value), other], token)
        gains.append(own - chance)
    return np.array(gains)


def _gains(
    lm: LM, prompts: tuple[str, ...], units: list[tuple[int, int, float]], token: int
) -> np.ndarray:
    """What each clamp adds to the log probability of a token, mean over prompts: (unit,)."""
    cells = [replaced(f"layers.{at}.mlp.act", value, units=[neuron]) for at, neuron, value in units]
    cells.append(scaled("layers.0.mlp.act", 1.0))  # nothing is changed
    log = sweep(
        lm, prompts, cells, lambda logits, _: torch.log_softmax(logits.float(), dim=-1)[:, token]
    )
    return (log[:-1] - log[-1]).mean(dim=1).numpy()
