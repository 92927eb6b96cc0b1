"""Does Circuit Analysis Interpretability Scale? Evidence from Multiple Choice Capabilities in
Chinchilla.

Lieberum, Rahtz, Kramar, Nanda, Irving, Shah and Mikulik, 2023. arXiv:2307.09458.
Claim: a small set of output nodes gives the letter of a multiple-choice answer, and the heads that
    pick it need few directions of queries and keys; on random letters this explains only part of
    what they do.
Methods: circuits.output_nodes, editing.low_rank_attention
Protocol: Chinchilla 70B is not to be had; in its place an open model of 7B or more that answers
    MMLU well above chance: logit attribution and patching of all heads and MLPs, curves over the
    size of the circuit (about 45 nodes in the paper), three directions of each correct-letter
    head, letters in order and random.

SmolLM2-135M does not answer such questions. The effect must appear in `tiny-mcq`, a miniature that
does; both are recorded. Section numbers are taken from another reader's notes on the full text.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

import stratoscope.models as models
from stratoscope.circuits import output_nodes
from stratoscope.claims import Measured, claim
from stratoscope.editing import low_rank_attention
from stratoscope.engine.intervene import ablate, intervene
from stratoscope.engine.metric import last_logits, target
from stratoscope.engine.trace import capture
from stratoscope.lab import make, planted
from stratoscope.lab.miniatures import tiny_mcq
from stratoscope.lab.miniatures.tiny_mcq import OPTIONS, Question
from stratoscope.lab.tasks import mcq
from stratoscope.models import LM
from stratoscope.results import label

NODES, RANK, DRAWS = 10, 3, 5
LEARN, TEST = 128, 400
PICKS = 0.5  # share of questions on which a correct-letter head looks most at the right option
LEAST = 0.05  # a pair of prompts whose logit differences are closer has nothing to recover
TRIED = """Tried before, on seed 7: only such heads as are output nodes, and only those after layer
0. Without them accuracy stayed at 0.99 and above, so that their compression, random or not, showed
nothing.""".replace("\n", " ")

Head = tuple[int, int]


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
    asked = {"corrupt": p.corrupt, "answer": p.answer, "foil": p.foil}
    found = output_nodes.measure(lm, p.clean, **asked, nodes=1, draws=20, seed=seed)
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
    expect="kept == 1 and random < 0.5",
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
        values={"kept": right(None)},
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
    expect="recovered >= 0.8 and recovered > random",
    direction="recovered > random",
    null={"random": "as many heads and MLPs drawn at random"},
    thresholds="0.8: the ledger's",
)
def few_nodes_give_the_letter(seed: int) -> Measured:
    """Nodes are ranked on some questions and patched, at the last token, on others; the corrupt
    question has the right option at another letter. `needed` is how many recover 80 %, `of` how
    many there are, `accuracy` the model's own.

    Ten of 36 nodes are not few: on seed 0 ten random ones recover 0.85, which is above the
    threshold too. What tells is the curve: the first four, which are the four MLPs, recover 0.96,
    four random ones 0.40."""
    lm = _miniature(seed)
    learn, test = _questions(LEARN, seed, seed + 1), _questions(LEARN, seed, seed + 2)
    return _nodes(lm, _pairs(lm, learn), _pairs(lm, test), _accuracy(lm, test), seed)


@claim(
    says="A small set of output nodes recovers the label",
    where="abstract; section 3.1",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="20 questions",
    valid="accuracy > 0.5",
    expect="recovered >= 0.8 and recovered > random",
    direction="recovered > random",
    null={"random": "as many heads and MLPs drawn at random"},
    thresholds="0.8: the ledger's; a model that answers less than half of the questions has "
    "no circuit for them",
)
def few_nodes_give_the_letter_as_it_comes(lm: LM, seed: int) -> Measured:
    """The same on SmolLM2-135M and `lab.tasks.mcq`: `accuracy` is the share whose top token is the
    letter (a guesser among the four has 0.25). On seed 0 it never is."""
    learn, test = (mcq.task(lm.tokenizer, 24, seed + shift) for shift in (1, 2))
    top = last_logits(lm, list(test.clean)).argmax(dim=-1) == torch.tensor(test.answer_ids)
    rows = [list(zip(t.clean, t.corrupt, t.answer_ids, t.foil_ids)) for t in (learn, test)]
    return _nodes(lm, *(_apart(lm, row) for row in rows), float(top.float().mean()), seed)


@claim(
    says="The query and key subspaces of correct-letter heads are compressed to three "
    "directions without loss",
    where="abstract; section 4.1",
    read="abstract",
    tier="small",
    subject="tiny-mcq",
    kind="miniature",
    n="400 questions",
    expect="compressed >= whole - 0.05 and compressed > random + 0.05 and off <= whole - 0.2",
    direction="compressed > random + 0.05 and off <= whole - 0.2",
    null={"random": "as many random directions of queries and keys"},
    thresholds="0.05 and 0.2: ours; that it is three directions is the ledger's",
)
def three_directions_are_enough(seed: int) -> Measured:
    """All correct-letter heads (on at least half of the questions they look most at the right
    option) keep three directions of query and of key at the last token, found on other questions.
    `off` is accuracy without these heads: it must fall, or nothing is shown. The paper's heads are
    few; in the miniature many share the work, so that all are compressed. On seed 0 three
    directions beat random ones (0.56 against 0.34) and lose almost half of the accuracy: more than
    the statement says."""
    lm = _miniature(seed)
    test = _questions(TEST, seed, seed + 2)
    heads = _letter_heads(lm, seed)
    with low_rank_attention.edit(lm, heads, **_learned(seed)):
        compressed = _accuracy(lm, test)
    with intervene(lm, *(ablate(f"layers.{a}.attn.z", units=[b], positions=-1) for a, b in heads)):
        off = _accuracy(lm, test)
    return Measured(
        values={"whole": _accuracy(lm, test), "compressed": compressed, "off": off},
        null={"random": _random(lm, heads, test, seed)},
        n=TEST,
        figure=_by_rank(lm, heads, test, seed),
        note=f"Correct-letter heads: {', '.join(f'L{a}H{b}' for a, b in heads)}. {TRIED}",
    )


@claim(
    says="With randomised labels the explanation is only partial",
    where="abstract; section 4.2, figure 11",
    read="abstract",
    tier="small",
    subject="tiny-mcq",
    kind="miniature",
    n="400 questions",
    valid="lost <= 0.1",
    expect="lost_on_random_letters >= lost + 0.05",
    direction="lost_on_random_letters > lost",
    null={"random": "as many random directions: what is lost on A B C D"},
    thresholds="0.05: ours; compared with the same explanation on the letters in their "
    "order, which must lose 0.1 at most for it to be one",
)
def random_letters_need_more(seed: int) -> Measured:
    """The three directions found on questions labelled A B C D, used on questions labelled by
    random letters: how much more accuracy is lost there? `own` is what is lost there with
    directions found on random letters. On seed 0 0.44 is lost on A B C D already, so that this
    compares a bad explanation with a worse one (0.54); directions of their own lose 0.45."""
    lm = _miniature(seed)
    heads = _letter_heads(lm, seed)
    letters, shuffled = (_questions(TEST, seed, seed + 2, shuffled=yes) for yes in (False, True))
    whole = [_accuracy(lm, asked) for asked in (letters, shuffled)]
    with low_rank_attention.edit(lm, heads, **_learned(seed)):
        left = [_accuracy(lm, asked) for asked in (letters, shuffled)]
    with low_rank_attention.edit(lm, heads, **_learned(seed, shuffled=True)):
        own = _accuracy(lm, shuffled)
    return Measured(
        values={
            "lost": whole[0] - left[0],
            "lost_on_random_letters": whole[1] - left[1],
            "own": whole[1] - own,
            "whole": whole[0],
            "whole_on_random_letters": whole[1],
        },
        null={"random": whole[0] - np.mean(_random(lm, heads, letters, seed))},
        n=TEST,
        note=f"Correct-letter heads: {', '.join(f'L{a}H{b}' for a, b in heads)}.",
    )


Row = tuple[str, str, int, int]  # clean, corrupt, answer, foil


@cache
def _miniature(seed: int) -> LM:
    return models.load(make("tiny-mcq", seed=seed))


def _questions(n: int, world: int, seed: int, *, shuffled: bool = False) -> list[Question]:
    return tiny_mcq.questions(n, seed, world=world, shuffled=shuffled)


def _pairs(lm: LM, asked: list[Question]) -> list[Row]:
    ids = lm.tokenizer.convert_tokens_to_ids
    return _apart(lm, [(q.clean, q.corrupt, ids(q.answer), ids(q.foil)) for q in asked])


def _apart(lm: LM, rows: list[Row]) -> list[Row]:
    """The pairs whose two logit differences are not the same."""
    clean, corrupt, answers, foils = (list(column) for column in zip(*rows))
    both = [
        target(lm, side, answers, foils).difference(last_logits(lm, side))
        for side in (clean, corrupt)
    ]
    return [row for row, gap in zip(rows, (both[0] - both[1]).abs().tolist()) if gap > LEAST]


def _nodes(lm: LM, learn: list[Row], test: list[Row], accuracy: float, seed: int) -> Measured:
    """Nodes ranked on `learn`, patched on `test`."""

    def measure(rows: list[Row], **options):
        clean, corrupt, answers, foils = (list(column) for column in zip(*rows))
        return output_nodes.measure(
            lm, clean, corrupt=corrupt, answer=answers, foil=foils, seed=seed, **options
        )

    names = measure(learn, nodes=NODES, draws=1).node.values.tolist()
    found = measure(test, nodes=names, draws=DRAWS)
    enough = np.flatnonzero(found.recovered.values >= 0.8)
    gap = found.clean_difference - found.corrupt_difference
    return Measured(
        values={
            "recovered": found.recovered[-1],
            "needed": enough[0] + 1 if len(enough) else np.inf,
            "of": found.sizes["component"],
            "accuracy": accuracy,
            "gap": gap.mean(),
        },
        null={"random": found.null[:, -1].values},
        n=len(test),
        figure=label(
            np.stack([found.recovered, found.null.mean("draw")]),
            ("role", "rank"),
            name="recovered",
            method="circuits.output_nodes",
            seed=seed,
            coords={"role": ["nodes", "random"], "node": (("rank",), names)},
        ),
        note=f"Nodes: {', '.join(names)}.",
    )


def _accuracy(lm: LM, asked: list[Question]) -> float:
    answers = torch.tensor(lm.tokenizer.convert_tokens_to_ids([q.answer for q in asked]))
    return float(
        (last_logits(lm, [q.clean for q in asked]).argmax(dim=-1) == answers).float().mean()
    )


@cache
def _letter_heads(lm: LM, seed: int) -> list[Head]:
    """Heads that, on at least half of the questions, look more at the right option, letter and
    word, than at any other."""
    asked = _questions(LEARN, seed, seed + 1)
    pattern = capture(lm, [q.clean for q in asked], "layers.*.attn.pattern", positions=-1).stack(
        "layers.*.attn.pattern"
    )
    # (layer, example, head, option)
    option = pattern.flatten(3)[..., : 2 * OPTIONS].unflatten(-1, (OPTIONS, 2)).sum(dim=-1)
    right = torch.tensor([q.labels.index(q.answer) for q in asked])
    picks = (option.argmax(dim=-1) == right[:, None]).float().mean(dim=1)
    return [(layer, head) for layer, head in (picks >= PICKS).nonzero().tolist()]


def _learned(seed: int, *, rank: int = RANK, shuffled: bool = False) -> dict:
    """What tells the edit its directions: questions, and the positions of their options."""
    asked = _questions(LEARN, seed, seed + 1, shuffled=shuffled)
    return {"prompts": [q.clean for q in asked], "keys": list(range(2 * OPTIONS)), "rank": rank}


def _random(
    lm: LM, heads: list[Head], asked: list[Question], seed: int, rank: int = RANK
) -> list[float]:
    found = []
    for draw in range(DRAWS):
        with low_rank_attention.edit(
            lm, heads, **_learned(seed, rank=rank), null=DRAWS * seed + draw
        ):
            found.append(_accuracy(lm, asked))
    return found


def _by_rank(lm: LM, heads: list[Head], asked: list[Question], seed: int):
    """Accuracy at 1 to 6 directions, of the questions' own and of random ones."""
    own, random = [], []
    for rank in range(1, 7):
        with low_rank_attention.edit(lm, heads, **_learned(seed, rank=rank)):
            own.append(_accuracy(lm, asked))
        random.append(np.mean(_random(lm, heads, asked, seed, rank)))
    return label(
        [own, random],
        ("role", "rank"),
        name="accuracy",
        method="editing.low_rank_attention",
        seed=seed,
        coords={
            "role": ["directions of the questions", "random directions"],
            "rank": list(range(1, 7)),
        },
    )
