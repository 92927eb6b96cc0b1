"""Decoding specialised feature neurons in LLMs with the final projection layer.

Davies, 2025. arXiv:2501.02688. In its second version: Flash Interpretability.
Claim: the weights of up-projection neurons, read through the LM head, name the concept that a
    neuron stands for; clamping it raises the concept's token, and most neurons keep their token
    through fine-tuning.
Methods: neurons.token_neurons, neurons.vocabulary, editing.clamp, editing.fine_tune, editing.jitter
Protocol: Llama 3.1 8B and its instruct version: every up-projection neuron through the LM head in
    both, the share with the same first token; 44 concepts clamped, and the same with
    down-projection neurons as the positive control.
What would change our mind: neurons found by their up weights that raise their token ten times as
    much as others do, in a model in which the down control does; a trained change that keeps more
    first tokens than chance does in the up weights alone, the head held.
What the authors may object: they show chosen neurons of a model sixty times as large, and compare
    it with an instruct version trained at length; here a model of 135 million parameters with
    weights decoded from 4 bits is trained for a minute. Layers of one net are no independent units:
    the seeds are. We read the abstract alone.

The abstract shows two neurons of Llama 3.1 8B and compares it with its instruct model. Here 44
words are asked, and SmolLM2-135M-Instruct, whose pretrained version is not at hand, is trained
briefly, as Gemma-3-270m is. The abstract does not say whether norms are folded into the weights;
here they are. A larger model (Qwen2.5-Coder-0.5B) takes more than ten minutes a seed and is not
among the subjects.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.editing import fine_tune, jitter
from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import replaced, scaled
from stratoscope.engine.sweep import sweep
from stratoscope.lab import data, planted
from stratoscope.lab.planted.canvas import ANSWER
from stratoscope.maths import resample
from stratoscope.models import LM
from stratoscope.neurons import token_neurons, vocabulary
from stratoscope.neurons._weights import Side
from stratoscope.results import label

WORDS = """dog cat horse bird fish tree flower river mountain sea winter summer rain snow fire water
bread milk wine sugar doctor teacher soldier king queen child mother school church hospital music
film book money gold war peace computer car train red green blue California Texas Paris London
Africa""".split()
CHOOSE = (
    "The best thing about it is the",
    "I would like to talk about",
    "My favourite",
    "She looked at the",
)
TEST = (
    "Yesterday we spoke about the",
    "He told me a story of a",
    "What I remember most is",
    "It was all because of the",
    "The book has a chapter on",
    "They could not live without",
    "In the picture you can see a",
    "The word I was looking for is",
)
CANDIDATES, VALUE = 4, 20.0  # neurons tried for each word, and at which values (either sign)
STEPS, RATE, TOKENS = 60, 3e-4, 128  # of the fine-tuning
LAYERS, NEURONS = 8, 512  # at least so many layers are read, evenly, and neurons of each
JITTERS, ORDERS = 3, 40  # changes by chance of each kind, orders of the neurons
SIDES: tuple[Side, ...] = ("up", "down")
LOG_TEN = float(np.log(10))
Unit = tuple[int, int, float]  # layer, neuron, the value it is held at


@claim(
    says="The LM head decodes an up-projection neuron into the token that it stands for",
    where="abstract",
    tier="identity",
    subject="planted fact model (Llama), one neuron's up weights set to a token's direction",
    expect="found == 1 and place == 0 and score > 1.2 * runner_up",
    null={"runner_up": "the score of the next best neuron of the whole model"},
)
def a_planted_reader_is_found(seed: int) -> Measured:
    """The neuron is found by its token among all neurons of the model, and the token is the
    neuron's own first."""
    p = planted.fact_lookup(seed)
    token = p.tokenizer("Kenya")["input_ids"][0]
    up = p.model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        up[7] = 0.0
        up[7, ANSWER[token]] = 1.0
    found = token_neurons.measure(
        models.wrap(p.model, p.tokenizer), "Kenya", side="up", top=2
    ).squeeze()
    best = found.isel(rank=0)
    return Measured(
        values={
            "found": (int(best.layer), int(best.neuron)) == (0, 7),
            "place": int(best.place),
            "score": float(best.score),
        },
        null={"runner_up": float(found.score[1])},
        n=1,
    )


@claim(
    says="Clamping the neuron of a concept raises the concept's token in the output",
    where="abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="44 words",
    valid="down_ratio_low > 3",
    expect="clamped_over_random_low >= 10 and clamped > picked",
    direction="clamped_over_picked_low > 1",
    null={
        "random": "a random neuron of the same layer at the same value",
        "picked": "the best of as many random neurons and signs, chosen as the concept neuron was",
    },
    thresholds="10: the ledger's; 3, by which neurons found by their down weights must do better"
    " than picked ones, so that the pipeline can see: the review's",
)
def clamping_raises_the_token(lm: LM, seed: int) -> Measured:
    """By which factor the token's probability grows: geometric mean over words and held-out
    prompts. The four neurons that the index names first are tried at +20 and -20, at all positions,
    on four prompts, and the best is tested on eight others; the index does not know the sign with
    which a gated neuron speaks, nor which of them speaks at all. `random` has not been chosen, so
    that `picked` is the fair opponent. down_ratio: the same by the down weights, over neurons
    picked alike in their layers: what writes a token must raise it. The words are the same for
    each seed, the random neurons are not. An earlier form took sixteen words: x1.7, x3.2 and x6.1
    on three seeds."""
    generator = random.Random(seed)
    ids = torch.tensor(
        [lm.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in WORDS]
    )
    found = {side: token_neurons.search(lm, ids, side=side, top=CANDIDATES) for side in SIDES}
    gains, said = [], []
    for row, token in enumerate(ids.tolist()):
        tested = []
        for layers, neurons, _ in found.values():
            named = list(zip(layers[row].tolist(), neurons[row].tolist()))
            strangers = [(layer, generator.randrange(lm.dims.neurons)) for layer, _ in named]
            tested += [_best(lm, units, token) for units in (named, strangers)]
        layer, neuron, value = tested[0]
        tested.append((layer, generator.randrange(lm.dims.neurons), value))
        gains.append(_gains(lm, TEST, tested, token).mean(dim=1))
        said.append(f"{WORDS[row]} L{layer}N{neuron} {'+' if value > 0 else '-'}")
    clamped, picked, down, down_picked, at_random = torch.stack(gains).double().numpy().T
    logs = {"clamped": clamped, "down_ratio": down - down_picked}
    logs |= {"clamped_over_picked": clamped - picked, "clamped_over_random": clamped - at_random}
    factor = {name: np.exp(resample.interval(log, seed=seed)[:3]) for name, log in logs.items()}
    return Measured(
        values={name: found[0] for name, found in factor.items()}
        | {"down": np.exp(down.mean()), "tenfold": (logs["clamped_over_random"] >= LOG_TEN).mean()},
        null={"random": np.exp(at_random.mean()), "picked": np.exp(picked.mean())},
        n=len(clamped),
        units={f"log_{name}": log for name, log in logs.items()},
        interval={name: (low, high) for name, (_, low, high) in factor.items()},
        figure=label(
            np.stack([clamped, picked, at_random, down], axis=1),
            ("example", "role"),
            name="log_gain",
            method="neurons.token_neurons",
            provenance=lm.provenance,
            seed=seed,
            coords={
                "concept": (("example",), WORDS),
                "role": ["clamped", "picked", "random", "down"],
            },
        ),
        note="; ".join(said),
    )


@claim(
    says="Over 75 % of up-projection neurons keep their top token through fine-tuning",
    where="abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="8 layers",
    valid="moved >= 0.01",
    expect="kept_low >= 0.75 and kept_low > 10 * shuffled_bound",
    direction="kept_low > 10 * shuffled_bound",
    we_add="more of them than after as large a change by chance of the same up weights, the head "
    "and all else held",
    we_expect="kept_up_low > jitter_up_high",
    null={
        "shuffled": "the neurons in another order, 40 draws",
        "jitter_up": "a normal change of the up weights alone, of each matrix as large as the "
        "fine-tuning's, mean of three draws",
        "jitter": "such a change of all matrices, the tied read-out among them",
    },
    thresholds="0.75: the paper's abstract; 0.01, by which the up weights must have moved, and 10:"
    " ours",
    found_there={"kept": 0.75},
)
def neurons_keep_their_token(lm: LM, seed: int) -> Measured:
    """Share of 512 neurons of each layer, drawn at random, whose first token is the same after 60
    steps of Adam at 3e-4 on 128 tokens of speeches each; of the layers at least eight are read, as
    far from each other as that allows. `moved` is the change of the up weights relative to their
    size, the mean over layers. kept: the whole trained model; kept_up: with the trained
    change of the up weights alone, so that the head and the norms that read them are as before. An
    earlier form let the null jitter the tied read-out as well, which trained changes hardly turn:
    training seemed to keep more than chance."""
    generator = random.Random(seed)
    texts = generator.sample([each["text"] for each in data("sotu").train], STEPS)
    made = fine_tune.edit(
        lm, [lm.tokenizer(t)["input_ids"][:TOKENS] for t in texts], steps=STEPS, rate=RATE
    )
    ups = {name: delta for name, delta in made.deltas.items() if name.endswith("up_proj.weight")}
    up_only = Edit(lm, deltas=ups, note="the up weights of the fine-tuning")
    layers = range(0, lm.dims.layers, max(1, (lm.dims.layers - 1) // (LAYERS - 1)))
    drawn = [(at, n) for at in layers for n in generator.sample(range(lm.dims.neurons), NEURONS)]
    before = _first(lm, drawn)
    changed = {"kept": [made], "kept_up": [up_only], "jitter": [jitter.edit(lm, made, seed=seed)]}
    changed["jitter_up"] = [
        jitter.edit(lm, up_only, seed=JITTERS * seed + i) for i in range(JITTERS)
    ]
    after = {name: [_first(lm, drawn, edit) for edit in edits] for name, edits in changed.items()}
    same = {
        name: np.mean([(tokens == before).mean(axis=1) for tokens in each], axis=0)
        for name, each in after.items()
    }
    orders, kept = np.random.default_rng(seed), after["kept"][0]
    shuffled = [
        float((before == kept[:, orders.permutation(NEURONS)]).mean()) for _ in range(ORDERS)
    ]
    sizes = [
        float(d.norm() / lm.model.get_parameter(name).detach().norm()) for name, d in ups.items()
    ]
    chance = resample.interval(same["jitter_up"], seed=seed)
    return Measured(
        values={"moved": np.mean(sizes)},
        null={"jitter": same["jitter"].mean(), "jitter_up": chance.value, "shuffled": shuffled},
        n=len(layers),
        units={"kept": same["kept"], "kept_up": same["kept_up"]},
        interval={"jitter_up": (chance.low, chance.high)},
        figure=label(
            np.stack([same[name] for name in ("kept", "kept_up", "jitter_up")], axis=1),
            ("layer", "role"),
            name="kept",
            method="neurons.token_neurons",
            coords={"layer": list(layers), "role": ["all", "up alone", "up jittered"]},
        ),
        note=f"{before.size:,} neurons. {made.note}",
    )


def _first(lm: LM, units: Sequence[tuple[int, int]], edit: Edit | None = None) -> np.ndarray:
    """The first token of neurons given layer by layer, with an edit made: (layer, neuron)."""
    with edit or nullcontext():
        rows = [
            vocabulary.measure(lm, units[at : at + NEURONS], top=1, side="up")["promoted"].values
            for at in range(0, len(units), NEURONS)
        ]
    return np.stack(rows)[..., 0]


def _best(lm: LM, units: Sequence[tuple[int, int]], token: int) -> Unit:
    """The neuron and value that raise a token most on the prompts for choosing."""
    tried = [(layer, neuron, value) for layer, neuron in units for value in (VALUE, -VALUE)]
    return tried[int(_gains(lm, CHOOSE, tried, token).mean(dim=1).argmax())]


def _gains(lm: LM, prompts: Sequence[str], units: Sequence[Unit], token: int) -> Tensor:
    """How much each clamp adds to the log probability of a token: (unit, prompt)."""
    cells = [replaced(f"layers.{at}.mlp.act", value, units=[neuron]) for at, neuron, value in units]
    cells.append(scaled("layers.0.mlp.act", 1.0))  # nothing is changed
    log = sweep(
        lm, prompts, cells, lambda logits, _: torch.log_softmax(logits.float(), dim=-1)[:, token]
    )
    return log[:-1] - log[-1]
