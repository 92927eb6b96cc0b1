"""Observable Propagation: A Data-Efficient Approach to Uncover Feature Vectors in Transformers.

Dunefsky and Cohan, 2023. arXiv:2312.16291.
Claim: feature vectors that are propagated back from an observable of the output, through weights
    and a few prompts without labels, predict what the parts of the model do to it.
Methods: circuits.feature_vectors, circuits.path_patching
Protocol: GPT-Neo 1.3B; pronouns of subject and object, and of occupations; political parties, and
    C against Python; vectors compared with path patching and with mean differences, by norms,
    cosines and coupling coefficients; maximally activating texts of the Pile.
What would change our mind: on a model that says the right pronoun, two-hop effects that the vectors
    order no better than the mean difference of the same prompts does.
What the authors may object: they compare norms of vectors with path patching head by head, we
    what every earlier head sends to a receiver; their model has 1.3 billion parameters; they find
    the point where an MLP is made linear between two prompts, we take each prompt's own; paths of
    the claim have no MLP on them.

The authors' code was read: the transposes of W_O and W_V, norm weights times sqrt(d) / |x|, an
MLP's gradient (at the point between a positive and a negative prompt where the observable
vanishes), the coupling coefficient. Their model has LayerNorms, whose mean their vectors leave in;
ours take it out. The norm before an MLP they hold; here it is part of the gradient.

One hop alone would make the claim trivial: with the final norm held it is direct logit attribution,
which is an identity here. Who else would pass: where senders stand (earlier heads write less), and
the size of what they send, which every direction feels (`random`); the difference between the two
kinds of prompt, which is where a probe would look (`mean_difference`). The cosine at a norm is near
one for any direction but the stream's own: it can fail, and no null of ours would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import transformers as hf
from torch import nn

from stratoscope.circuits import feature_vectors
from stratoscope.claims import Measured, claim
from stratoscope.engine.edges import ends, exact
from stratoscope.engine.pair import pair
from stratoscope.engine.trace import capture
from stratoscope.engine.wiring import wiring
from stratoscope.lab import planted
from stratoscope.lab.tasks import pronoun
from stratoscope.maths.resample import percentile
from stratoscope.models import LM, wrap
from stratoscope.results import label

KNOWN, JUDGED = 10, 40  # pairs that vectors come of, and that judge them
RECEIVERS, DRAWS = 10, 20
SHE = {" she": 1.0, " he": -1.0}


class Prompts(NamedTuple):
    """Pairs that differ in the name; she: those of a woman."""

    she: Sequence
    he: Sequence


@claim(
    says="A head's feature vector is its values and its output matrix carried back, and what all "
    "paths bring adds up to the observable where the model is linear",
    where="the authors' code (get_attn_normal, coupling_coeff)",
    tier="identity",
    subject="a random llama of two layers without norms and MLPs, and a planted copying head",
    expect="gap <= 0.00001 and planted_rank == 0 and wrong > 0.001",
    null={"wrong": "the same with key/value head h % 2 in the place of h // 2"},
)
def paths_add_up(seed: int) -> Measured:
    """Vectors against the weights of every head, their sum over all paths against plain logits; the
    planted head's place among the contributions of all heads."""
    lm, prompt = _linear(seed), [3, 14, 15, 92, 65, 35]
    row = lm.model.lm_head.weight[7] - lm.model.lm_head.weight[8]
    observable = {7: 1.0, 8: -1.0}
    with torch.no_grad():
        logits = lm.model(torch.tensor([prompt])).logits[0, -1]
    gaps, wrong, total = [], [], 0.0
    for head in (None, *range(lm.dims.heads)):
        path = () if head is None else (("head", 1, head),)
        fitted = feature_vectors.fit(lm, [prompt], observable=observable, path=path)
        found = feature_vectors.measure(lm, [prompt], vectors=fitted, draws=1).isel(example=0)
        total += float((found.score * found.through).sum())
        if head is None:
            total -= float(found.contribution.sel(layer=1).sum())
            continue
        right, other = (_by_hand(lm, row, head, kv) for kv in (head // 2, head % 2))
        gaps.append(float((fitted.vector[-1] - right).abs().max()))
        wrong.append(float((fitted.vector[-1] - other).abs().max()))
    p = planted.copy_head(seed)
    small = wrap(p.model, p.tokenizer)
    fitted = feature_vectors.fit(small, p.clean, observable={p.answer: 1.0, p.foil: -1.0})
    score = feature_vectors.measure(small, p.clean, vectors=fitted, draws=1).contribution.values[0]
    [head] = p.heads
    return Measured(
        values={
            "gap": max(*gaps, abs(total - float(logits[7] - logits[8]))),
            "planted_rank": int((score > score[head]).sum()),
        },
        null={"wrong": max(wrong)},
        n=len(gaps),
    )


@claim(
    says="Feature vectors of ten prompts without labels predict what earlier heads send through a "
    "head's values to the output, better than the mean difference of as many prompts",
    where="section 4.1 (norms against path patching), abstract (data-efficient)",
    read="authors' code",
    tier="small",
    subjects=("smollm2", "qwen2.5-coder-0.5b"),
    n="40 prompts",
    valid="accuracy >= 0.8 and pairs >= 1000",
    expect="r_low >= 0.7 and gain_low > 0.1 and r_low > random_bound and cosine_low >= 0.9",
    direction="r > mean_difference and r > 3 * random",
    we_add="it orders them better than the mean difference does once that has the sign and the "
    "scale that the head's vector gives it",
    we_expect="scaled_gain_low > 0",
    null={
        "mean_difference": "r of the mean difference between the same ten pairs of prompts where "
        "the receiver reads, of the vector's length",
        "scaled": "the same with the length and sign that give what the vector gives there",
        "random": "size of r of random directions of the vector's length, 20 draws",
    },
    thresholds="0.7, 0.1, 0.9, 3 and 1,000 pairs: the specification's; 0.8: the task must be done "
    "(0.94 measured before); the least that would matter is a gain of 0.1",
)
def two_hops_predicted(lm: LM, seed: int) -> Measured:
    """She less he after a name. The ten heads that bring most by direct attribution are receivers,
    found on ten pairs; every head before one is a sender. Truth, on 40 other pairs: the sender's
    change from one prompt to the other, put into the receiver's values alone, run to the logits.
    r: between both over all pairs of sender and receiver, means over prompts."""
    known, judged = _prompts(lm, seed)
    first = feature_vectors.fit(lm, known.she, observable=SHE)
    receivers = _receivers(lm, first, known)
    guesses = [_guesses(lm, known, judged, receiver, seed) for receiver in receivers]
    # (vector, prompt, pair)
    guessed = np.concatenate(guesses, axis=-1)
    true, accuracy = _truth(lm, judged, receivers)
    r = partial(_r, guessed, true)
    everyone = np.arange(len(true))
    found = percentile(lambda rows: r(0, rows), everyone, seed=seed)
    gain, scaled_gain = (
        percentile(lambda rows, rival=rival: r(0, rows) - r(rival, rows), everyone, seed=seed)
        for rival in (1, 2)
    )
    cuts = np.cumsum([one.shape[-1] for one in guesses])[:-1]
    parts = zip(*(np.split(x, cuts, axis=-1) for x in (guessed, true)))
    each = [_r(one, two, 0, everyone) for one, two in parts]
    cosine = feature_vectors.fit(lm, judged.she, observable=SHE).norm_cosine.numpy()
    return Measured(
        values={
            "r": found.value,
            "gain": gain.value,
            "scaled_gain": scaled_gain.value,
            "left": 1 - found.value**2,
            "accuracy": accuracy,
            "pairs": guessed.shape[-1],
        },
        units={"cosine": cosine},
        interval={
            "r": (found.low, found.high),
            "gain": (gain.low, gain.high),
            "scaled_gain": (scaled_gain.low, scaled_gain.high),
        },
        null={
            "mean_difference": r(1, everyone),
            "scaled": r(2, everyone),
            "random": [abs(r(3 + draw, everyone)) for draw in range(DRAWS)],
        },
        n=len(true),
        figure=label(each, ("rank",), name="r", method="circuits.feature_vectors", seed=seed),
        note="Receivers: " + ", ".join(f"L{layer}H{head}" for layer, head in receivers) + ".",
    )


def _prompts(lm: LM, seed: int) -> tuple[Prompts, Prompts]:
    """Pairs to fit on and others to judge by, the woman's prompt first."""
    made = pronoun.task(lm.tokenizer, KNOWN + JUDGED, seed)
    rows = [
        (one, two) if answer == " she" else (two, one)
        for one, two, answer in zip(made.clean, made.corrupt, made.answers)
    ]
    she, he = zip(*rows)
    return Prompts(she[:KNOWN], he[:KNOWN]), Prompts(she[KNOWN:], he[KNOWN:])


def _receivers(lm: LM, first: feature_vectors.Vectors, known: Prompts) -> list[tuple[int, int]]:
    """The heads that bring most to the observable's difference, of all layers but the first."""
    found = feature_vectors.measure(lm, known.she, corrupt=known.he, vectors=first, draws=1)
    size = np.abs(found.contribution.mean("example").values)
    size[0] = 0
    order = np.argsort(-size, axis=None)[:RECEIVERS]
    return [divmod(int(place), lm.dims.heads) for place in order]


def _guesses(
    lm: LM, known: Prompts, judged: Prompts, receiver: tuple[int, int], seed: int
) -> np.ndarray:
    """(vector, prompt, sender): by the feature vector, by the mean difference as it is and scaled,
    by random ones."""
    layer, head = receiver
    fitted = feature_vectors.fit(lm, known.she, observable=SHE, path=(("head", layer, head),))
    site = f"layers.{layer}.resid_pre"
    one, two = (capture(lm, prompts, site)[site] for prompts in known)
    at = torch.tensor([positions[-1] for positions in fitted.positions])
    every = torch.arange(len(at))
    apart = (one - two)[every, at].mean(dim=0)
    length = fitted.vector[-1].norm() / apart.norm()
    rival = replace(fitted, each=torch.stack([fitted.vector[0], length * apart])[None])
    given = {"corrupt": judged.he, "seed": seed}
    own = feature_vectors.measure(lm, judged.she, vectors=fitted, draws=DRAWS, **given)
    other = feature_vectors.measure(lm, judged.she, vectors=rival, draws=1, **given)
    scale = float(fitted.vector[-1] @ apart / (length * apart @ apart))
    plain = other.contribution.values
    rows = [own.contribution.values, plain, scale * plain, *own.null_contribution.values]
    return np.stack(rows)[:, :, :layer].reshape(len(rows), len(plain), -1)


def _truth(
    lm: LM, judged: Prompts, receivers: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, float]:
    """What the difference loses (prompt, sender and receiver) by exact patching of each edge into
    the values; and the share of prompts that get their pronoun."""
    wires = wiring(lm)
    names = [
        (f"L{n}H{h}", f"L{layer}H{head}.v")
        for layer, head in receivers
        for n in range(layer)
        for h in range(wires.heads)
    ]
    both = pair(lm, judged.she, judged.he, " she", " he", "noise")
    paths = wires.paths(names)
    rows = [exact(one, one.delta, paths) for [one] in ends(lm, both)]
    right = torch.cat([both.clean_difference > 0, both.corrupt_difference < 0])
    lost = both.clean_difference[:, None] - torch.stack(rows).float().cpu()
    return lost.numpy(), float(right.float().mean())


def _r(guessed: np.ndarray, true: np.ndarray, vector: int, rows: np.ndarray) -> float:
    """Correlation over pairs of the means over these prompts."""
    means = guessed[vector, rows].mean(axis=0), true[rows].mean(axis=0)
    return float(np.corrcoef(*means)[0, 1])


def _linear(seed: int) -> LM:
    """A llama that is linear but for its patterns; two query heads to each key/value head."""
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        initializer_range=0.2,
    )
    model = hf.LlamaForCausalLM(config).eval()
    model.model.norm = nn.Identity()  # type: ignore[assignment]
    for layer in model.model.layers:
        layer.input_layernorm = nn.Identity()
        layer.mlp.down_proj.weight.data.zero_()
    return wrap(model)


@torch.no_grad()
def _by_hand(lm: LM, row: torch.Tensor, head: int, kv: int) -> torch.Tensor:
    """W_V^T W_O^T y of a head of the last layer, from the plain weights."""
    attention, size = lm.model.model.layers[1].self_attn, lm.dims.head_dim
    o = attention.o_proj.weight[:, head * size : (head + 1) * size]
    return attention.v_proj.weight[kv * size : (kv + 1) * size].T @ (o.T @ row)
