"""Does Circuit Analysis Interpretability Scale? Evidence from Multiple Choice Capabilities in
Chinchilla.

Lieberum, Rahtz, Kramar, Nanda, Irving, Shah and Mikulik, 2023. arXiv:2307.09458.
Claim: a small set of output nodes gives the letter of a multiple-choice answer, and the heads that
    pick it need few directions of queries and keys; on random letters this explains only part of
    what they do.
Methods: circuits.output_nodes, heads.correct_letter, editing.low_rank_attention
Protocol: Chinchilla 70B is not to be had; in its place an open model of 7B or more that answers
    MMLU well above chance: logit attribution and patching of all heads and MLPs, curves over the
    size of the circuit (about 45 nodes in the paper), three directions of each correct-letter
    head, letters in order and random.
What would change our mind: as many random heads and MLPs, or random directions, recover as much;
    or a model that answers needs far more than a twentieth of its nodes.
What the authors may object: a miniature that was trained on these questions alone has nothing else
    to do, its letters were half learned at random, and most of its heads look at the right option,
    where theirs are a few; three directions of 16 are more than three of 128; with 70 billion
    parameters they have some 5,200 nodes, of which 45 are a hundredth; values, which they compress
    too, we leave whole; we read the abstract alone.

No model of ours that reads English answers such questions, so that the effect must appear in
`tiny-mcq`, a miniature that does; both are recorded. Its output nodes are sought among 264 heads
and MLPs, since an earlier one had 36, of which ten at random gave the letter too. Section numbers
are taken from another reader's notes on the full text.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import xarray as xr

import stratoscope.models as models
from stratoscope.circuits import output_nodes
from stratoscope.claims import Measured, claim
from stratoscope.editing import drop_heads, low_rank_attention
from stratoscope.engine.metric import last_logits
from stratoscope.heads import correct_letter
from stratoscope.lab import make, planted
from stratoscope.lab.miniatures import tiny_mcq
from stratoscope.lab.miniatures.tiny_mcq import OPTIONS, Question
from stratoscope.lab.tasks import mcq
from stratoscope.maths import resample
from stratoscope.models import LM
from stratoscope.results import label

FEW, MOST = 0.05, 0.10  # shares of all nodes: what is judged, and where the curve ends
RANK, DRAWS = 3, 20
LEARN, TEST = 128, 400  # questions of the miniature: to find with, and to test letters with
FIND, ASK, SHOTS = 24, 40, 3  # of a real model: to find with, to test with, solved before each
ANSWERS = 0.5  # a real model that answers fewer is not looked into

Row = tuple[str, str, int, int]  # clean, corrupt, answer, foil


@claim(
    says="Logit attribution and activation patching find the nodes that write the answer",
    where="abstract",
    tier="identity",
    subject="planted.indirect_object",
    expect="first == 1 and recovered > 0.8 and recovered > random + 0.5",
    null={"random": "one head or MLP drawn at random, the mean of 20 draws"},
)
def the_planted_writer_is_found(seed: int) -> Measured:
    """A hand-built model of four layers: one head copies the answer out, and it alone brings it
    back at the last token."""
    p = planted.indirect_object(seed)
    lm = models.wrap(p.model, p.tokenizer)
    words = {"corrupt": p.corrupt, "answer": p.answer, "foil": p.foil}
    found = output_nodes.measure(lm, p.clean, **words, nodes=1, draws=20, seed=seed)
    return Measured(
        values={"first": float(found.node.values[0] == "L2H3"), "recovered": found.recovered[0]},
        null={"random": found.null.mean()},
        n=1,
    )


@claim(
    says="Query and key subspaces of a head can be compressed without loss",
    where="abstract",
    tier="identity",
    subject="planted.copy_head",
    expect="right == 1 and random < 0.5",
    null={"random": "one random direction of query and of key, the mean of 5 draws"},
)
def a_planted_head_needs_one_direction(seed: int) -> Measured:
    """A hand-built head that looks from the word that asks to the word that is marked: one
    direction each."""
    p = planted.copy_head(seed)
    lm = models.wrap(p.model, p.tokenizer)
    variants = p.variants(32, seed)
    learn, test = [v.clean for v in variants[:8]], [v.clean for v in variants[8:]]
    answers = torch.tensor([p.tokenizer.convert_tokens_to_ids(v.answer) for v in variants[8:]])

    def right(null: int | None) -> float:
        with low_rank_attention.edit(lm, [(1, 3)], prompts=learn, rank=1, null=null):
            return float((last_logits(lm, test).argmax(dim=-1) == answers).float().mean())

    return Measured(
        values={"right": right(None)},
        null={"random": np.mean([right(seed + n) for n in range(5)])},
        n=len(test),
    )


@claim(
    says="A small set of output nodes recovers the label",
    where="abstract; section 3.1",
    read="abstract",
    tier="small",
    subject="tiny-mcq",
    kind="miniature",
    n="100 questions",
    valid="accuracy > 0.5",
    expect="recovered_low >= 0.8 and recovered_low > random_bound",
    direction="recovered_low > random_bound",
    null={"random": "as many heads and MLPs drawn at random from all layers, 20 draws"},
    thresholds="0.8: the ledger's, at a twentieth of the nodes (the review's; the paper: some "
    "hundredth); a model that answers less than half of the questions has no circuit for them",
    found_there={"of": 5200.0, "needed": 45.0},
)
def few_nodes_give_the_letter(seed: int) -> Measured:
    """Nodes are ranked on some questions and patched, at the last token, on others; the corrupt
    question has the right option at another letter. recovered: by a twentieth of the nodes, over
    questions; `needed` is how many recover 80 %, infinite where a tenth does not, `of` how many
    there are, `accuracy` the model's own."""
    lm = models.load(make("tiny-mcq", seed=seed, layers=8, heads=32))
    learn, test = (_questions(LEARN, seed, shift) for shift in (1, 2))
    ids = lm.tokenizer.convert_tokens_to_ids
    rows = [
        [(q.clean, q.corrupt, ids(q.answer), ids(q.foil)) for q in some] for some in (learn, test)
    ]
    return _nodes(lm, *rows, _right(lm, test), seed)


@claim(
    says="A small set of output nodes recovers the label",
    where="abstract; section 3.1",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m", "qwen2.5-coder-0.5b"),
    n="20 questions",
    valid="accuracy > 0.5 and accuracy_low > 0.25",
    expect="recovered_low >= 0.8 and recovered_low > random_bound",
    direction="recovered_low > random_bound",
    null={"random": "as many heads and MLPs drawn at random from all layers, 20 draws"},
    thresholds="0.8: the ledger's, at a twentieth of the nodes; a model that answers less than "
    "half of the questions has no circuit for them, nor one that may do no better than a guesser, "
    "0.25",
    found_there={"of": 5200.0, "needed": 45.0},
)
def few_nodes_give_the_letter_as_it_comes(lm: LM, seed: int) -> Measured:
    """The same with `lab.tasks.mcq`: easy questions in English, labelled A B C D, after three
    solved ones. `accuracy` is the share of those on which the right letter has the highest logit
    of the four, as MMLU is scored. A model that answers no more than half of them is not looked
    into any further."""
    task = mcq.task(lm.tokenizer, FIND + ASK, seed, ordered=True, shots=SHOTS)
    rows = list(zip(task.clean, task.corrupt, task.answer_ids, task.foil_ids))
    letters = torch.tensor(sorted({*task.answer_ids, *task.foil_ids}))
    best = last_logits(lm, list(task.clean[FIND:])).cpu()[:, letters].argmax(dim=-1)
    right = (letters[best] == torch.tensor(task.answer_ids[FIND:])).float().numpy()
    if right.mean() > ANSWERS:
        return _nodes(lm, rows[:FIND], rows[FIND:], right, seed)
    return Measured(
        values={"recovered": np.nan},
        units={"accuracy": right},
        interval={"recovered": (np.nan, np.nan)},
        null={"random": [np.nan] * DRAWS},
        n=ASK,
    )


@claim(
    says="The query and key subspaces of correct-letter heads are compressed to three "
    "directions without loss",
    where="abstract; section 4.1",
    read="abstract",
    tier="small",
    subject="tiny-mcq",
    kind="miniature",
    n="400 questions",
    valid="off_high <= whole - 0.2",
    expect="compressed_low >= whole - 0.05 and compressed_low > random_bound + 0.05",
    direction="compressed_low > random_bound + 0.05",
    null={"random": "as many random directions of queries and keys, 20 draws"},
    thresholds="0.05 and 0.2: ours (without the heads accuracy must fall, or their compression "
    "shows nothing); that it is three directions is the ledger's",
)
def three_directions_are_enough(seed: int) -> Measured:
    """All correct-letter heads (on at least half of the questions they look most at the right
    option) keep three directions of query and of key at the last token, found on other questions;
    off: accuracy without these heads. The paper's heads are few; in the miniature many share the
    work, so that all are compressed. Pilots took only such heads as are output nodes, or only those
    after layer 0: without them accuracy stayed at 0.99."""
    lm = _miniature(seed)
    test, heads = _questions(TEST, seed, 2), _letter_heads(lm, seed)
    with drop_heads.edit(lm, heads, positions=-1):
        off = _right(lm, test)
    compressed = _compressed(lm, seed, test)
    return Measured(
        units={"whole": _right(lm, test), "compressed": compressed, "off": off},
        null={"random": _random(lm, seed, test)},
        n=TEST,
        figure=_by_rank(lm, seed, test),
        note=_named(heads),
    )


@claim(
    says="With randomised labels the explanation is only partial",
    where="abstract; section 4.2, figure 11",
    read="abstract",
    tier="small",
    subject="tiny-mcq",
    kind="miniature",
    n="400 questions",
    valid="lost_high <= 0.1",
    expect="lost_on_random_letters_low >= lost_high + 0.05",
    direction="lost_on_random_letters_low > lost_high",
    null={"random": "as many random directions: what is lost on A B C D"},
    thresholds="0.05: ours; compared with the same explanation on the letters in their "
    "order, which must lose 0.1 at most for it to be one",
)
def random_letters_need_more(seed: int) -> Measured:
    """The three directions found on questions labelled A B C D, used on questions labelled by
    random letters: how much more accuracy is lost there? `own` is what is lost there with
    directions found on random letters."""
    lm = _miniature(seed)
    letters, shuffled = (_questions(TEST, seed, 2, shuffled=yes) for yes in (False, True))
    ordered, random = (_right(lm, test) for test in (letters, shuffled))
    return Measured(
        units={
            "lost": ordered - _compressed(lm, seed, letters),
            "lost_on_random_letters": random - _compressed(lm, seed, shuffled),
            "own": random - _compressed(lm, seed, shuffled, by_shuffled=True),
        },
        values={"whole": ordered.mean(), "whole_on_random_letters": random.mean()},
        null={"random": ordered.mean() - np.array(_random(lm, seed, letters))},
        n=TEST,
        note=_named(_letter_heads(lm, seed)),
    )


def _nodes(lm: LM, learn: list[Row], test: list[Row], right: np.ndarray, seed: int) -> Measured:
    """Nodes ranked on `learn`, patched on `test`; right: whether each of these is answered."""

    def measure(rows: list[Row], **options) -> xr.Dataset:
        clean, corrupt, answers, foils = (list(column) for column in zip(*rows))
        words = {"corrupt": corrupt, "answer": answers, "foil": foils}
        return output_nodes.measure(lm, clean, **words, seed=seed, **options)

    direct = measure(learn, nodes=1, draws=0).direct.mean("example")
    few, most = (round(share * direct.size) for share in (FEW, MOST))
    names = direct.component.values[np.argsort(-direct.values, kind="stable")][:most].tolist()
    sizes = sorted({few, *np.geomspace(1, most, 6).round().astype(int).tolist()})
    found = measure(test, nodes=names, draws=DRAWS, sizes=sizes)
    enough = np.flatnonzero(found.recovered.values >= 0.8)
    way = abs(found.clean_difference - found.corrupt_difference)
    recovered = resample.interval(found.moved[:, few - 1].values, way.values, seed=seed)
    at = [size - 1 for size in sizes]
    return Measured(
        values={
            "recovered": recovered.value,
            "needed": enough[0] + 1 if len(enough) else np.inf,
            "few": few,
            "of": direct.size,
            "gap": way.mean(),
        },
        units={"accuracy": right},
        null={"random": found.null[:, few - 1].values},
        interval={"recovered": (recovered.low, recovered.high)},
        n=len(test),
        figure=label(
            np.stack([found.recovered[at], found.null[:, at].mean("draw")]),
            ("role", "rank"),
            name="recovered by the first nodes",
            method="circuits.output_nodes",
            seed=seed,
            coords={"role": ["nodes", "random"], "rank": sizes},
        ),
        note=f"Nodes: {', '.join(names[:few])}.",
    )


@cache
def _miniature(seed: int) -> LM:
    return models.load(make("tiny-mcq", seed=seed))


def _questions(n: int, world: int, shift: int, *, shuffled: bool = False) -> list[Question]:
    return tiny_mcq.questions(n, world + shift, world=world, shuffled=shuffled)


def _right(lm: LM, test: list[Question]) -> np.ndarray:
    """Whether each question's letter is the top token (question,)."""
    answers = torch.tensor(lm.tokenizer.convert_tokens_to_ids([q.answer for q in test]))
    return (last_logits(lm, [q.clean for q in test]).argmax(dim=-1) == answers).float().numpy()


@cache
def _letter_heads(lm: LM, seed: int) -> list[correct_letter.Head]:
    """Heads that, on at least half of the questions, look more at the right option, letter and
    word, than at any other."""
    learn = _questions(LEARN, seed, 1)
    options = [[[2 * place, 2 * place + 1] for place in range(OPTIONS)]] * LEARN
    right = [q.labels.index(q.answer) for q in learn]
    found = correct_letter.measure(lm, [q.clean for q in learn], options=options, right=right)
    return correct_letter.heads(found)


def _named(heads: list[correct_letter.Head]) -> str:
    return f"Correct-letter heads: {', '.join(f'L{a}H{b}' for a, b in sorted(heads))}."


def _compressed(
    lm: LM,
    seed: int,
    test: list[Question],
    *,
    by_shuffled: bool = False,
    rank: int = RANK,
    null: int | None = None,
) -> np.ndarray:
    """Whether questions are answered (question,) when the letter heads keep `rank` directions,
    which others and the places of their options tell, or as many random ones."""
    learn = _questions(LEARN, seed, 1, shuffled=by_shuffled)
    prompts, keys = [q.clean for q in learn], list(range(2 * OPTIONS))
    heads = _letter_heads(lm, seed)
    with low_rank_attention.edit(lm, heads, prompts=prompts, keys=keys, rank=rank, null=null):
        return _right(lm, test)


def _random(
    lm: LM, seed: int, test: list[Question], *, rank: int = RANK, draws: int = DRAWS
) -> list[float]:
    """Accuracy with random directions, draw by draw."""
    nulls = [DRAWS * seed + draw for draw in range(draws)]
    return [float(_compressed(lm, seed, test, rank=rank, null=null).mean()) for null in nulls]


def _by_rank(lm: LM, seed: int, test: list[Question]) -> xr.DataArray:
    """Accuracy at 1 to 6 directions, of the questions' own and of random ones, four draws each."""
    ranks = list(range(1, 7))
    own = [_compressed(lm, seed, test, rank=rank).mean() for rank in ranks]
    random = [np.mean(_random(lm, seed, test, rank=rank, draws=4)) for rank in ranks]
    return label(
        [own, random],
        ("role", "rank"),
        name="accuracy",
        method="editing.low_rank_attention",
        seed=seed,
        coords={"role": ["directions of the questions", "random directions"], "rank": ranks},
    )
