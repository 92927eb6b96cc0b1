"""Circuit Component Reuse Across Tasks in Transformer Language Models.

Merullo, Eickhoff and Pavlick, 2023. arXiv:2310.08744.
Claim: the heads that tell who receives (indirect objects) are mostly those that tell which colour a
    thing has (Colored Objects); where the second task goes wrong, it is repaired by making four
    middle heads attend as they do in the first.
Methods: circuits.overlap, editing.force_attention, editing.drop_heads
Protocol: GPT-2 medium on the authors' prompts: path patching to the logits and then back, step by
    step, to the queries, values and keys of what was found, the upper 2 % of heads at each step in
    both tasks; then the four inhibition heads of IOI forced onto the two wrong colours.
    `stratoscope claim circuit-reuse --model YOUR/MODEL` runs the small one.
What would change our mind: a model that does both tasks and whose strongest heads in one are no
    more among those of the other than among those of a task of numbers; or heads chosen on IOI
    that, forced onto the wrong colours, do no more for the right one than others of their layers.
What the authors may object: our circuits are one step deep, heads that write to the logits, theirs
    have all steps; their path patching lets MLPs answer to a changed head, ours holds them, and
    takes 5 % of heads where they take 2 % at each step; our models are smaller or of another make,
    and may have no inhibition heads.

The authors' code was read for path patching (heads patched at the last token, all other heads
held, MLPs held only on request, the change as a share of that between both prompts) and for the
prompts of both tasks, whose corrupt ones name the other person or ask for another thing, as here.
It holds neither the intervention nor the count of heads that two circuits share: the abstract and
the specification have these.

Pilots (seed 1000, no threshold taken from them). smollm2, 8 pairs of each task, 24 prompts of
colours: overlap 0.64, with greater-than 0.21; right colour 0.33, forced 0.42, onto the right one
0.38. qwen2.5-coder-0.5b, 2 pairs, 6 prompts, which set only how many draws there is time for.

Who else would pass: heads that write to the logits in any task (`other_task`: how far IOI's heads
are those of greater-than), chance (`chance`), and any heads of these layers (`random`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

import stratoscope.models as models
from stratoscope.circuits import overlap
from stratoscope.circuits.overlap import Head
from stratoscope.claims import Measured, claim
from stratoscope.editing import drop_heads, force_attention
from stratoscope.engine.intervene import intervene, replaced
from stratoscope.engine.metric import last_logits, target
from stratoscope.engine.pair import Pair, pair
from stratoscope.engine.trace import capture
from stratoscope.lab import planted, tasks
from stratoscope.lab.tasks import Task
from stratoscope.models import LM
from stratoscope.results import label

SHARE, PROMPTS = 0.05, 48  # of all heads; prompts of each task
FINDING, MOVERS, FORCED = 24, 3, 4  # pairs of IOI; heads found on them
ITEMS, DRAWS, PARTS = 96, 20, 4  # a random set of heads is asked one part of the prompts


@claim(
    says="Forced onto the other name, the head that copies a name turns the answer round",
    where="section on the intervention, as the specification has it",
    tier="identity",
    subject="planted.indirect_object",
    expect="flipped == 1 and own == 1 and attended == 1 and random_flipped < 0.5 and "
    "scores_attended < 0.5",
    null={
        "random_flipped": "another head of the same layer forced alike",
        "scores_attended": "attention to the other name where the same numbers are written before "
        "softmax: the wrong thing to force",
    },
)
def the_planted_answer_turns_round(seed: int) -> Measured:
    """A hand-built circuit: one head copies the name that was said once. flipped: share of prompts
    whose answer becomes the other name; own: what a task shares with itself."""
    p = planted.indirect_object(seed)
    lm, some = models.wrap(p.model, p.tokenizer), p.variants(6, seed)
    prompts, corrupt, answers, foils = (list(column) for column in zip(*some))
    layer, mover = max(p.heads)
    asked = target(lm, prompts, answers, foils)
    places = [[prompt.split().index(foil)] for prompt, foil in zip(prompts, foils)]
    site = f"layers.{layer}.attn.pattern"

    def attended() -> float:
        pattern = capture(lm, prompts, site, positions=-1)[site][:, mover]
        return float(pattern.gather(1, torch.tensor(places)).mean())

    def flipped(head: int) -> float:
        with force_attention.edit(lm, [(layer, head)], keys=places):
            return float((asked.difference(last_logits(lm, prompts)) < 0).double().mean())

    with force_attention.edit(lm, [(layer, mover)], keys=places):
        forced = attended()
    before = {"site": f"layers.{layer}.attn.scores", "positions": -1, "units": [mover]}
    wrong = [replaced(value=0.0, **before), replaced(value=1.0, keys=places, **before)]
    with intervene(lm, *wrong):
        spread = attended()
    words = {"corrupt": corrupt, "answer": answers, "foil": foils}
    again = {f"other_{name}": given for name, given in words.items()}
    own = overlap.measure(lm, prompts, other=prompts, k=3, seed=seed, **words, **again)
    others = [flipped(head) for head in range(lm.dims.heads) if head != mover]
    return Measured(
        values={"flipped": flipped(mover), "own": own.overlap.item(), "attended": forced},
        null={"random_flipped": max(others), "scores_attended": spread},
        n=len(prompts),
    )


@claim(
    says="The heads that write the answer of one task are mostly those that write that of another",
    where="abstract (about 78 % of in-circuit heads)",
    read="authors' code",
    tier="small",
    subjects=("smollm2", "qwen2.5-coder-0.5b"),
    n="48 prompts of each task",
    valid="ioi_low > 0.5 and colours_low > 0.5 and greater_low > 0.5",
    expect="overlap_low >= 0.5 and overlap_low >= 3 * chance_high and overlap_low > "
    "other_task_high",
    direction="overlap > chance_high",
    null={
        "chance": "as many heads drawn for each task from all heads, with the ends of 95 % of "
        "such draws",
        "other_task": "the overlap of IOI with greater-than, a task of numbers",
    },
    thresholds="0.5 and 3: the specification's and the ledger's; a model that does a task tells "
    "its two prompts apart in more than half of the pairs",
    found_there={"overlap": 0.78},
)
def same_heads(lm: LM, seed: int) -> Measured:
    """IOI, Colored Objects and greater-than, 48 pairs of prompts each; the 5 % of heads whose path
    to the logits carries most of the difference between the prompts. Intervals over prompts, drawn
    again. ioi, colours, greater: the share of pairs whose answer gains on its foil from the corrupt
    prompt to the clean one."""
    heads = lm.dims.layers * lm.dims.heads
    k = round(SHARE * heads)
    asked = {
        "ioi": tasks.task("ioi")(lm.tokenizer, PROMPTS, seed),
        "colours": tasks.task("colored_objects")(lm.tokenizer, PROMPTS, seed),
        "greater": tasks.task("greater_than")(lm.tokenizer, PROMPTS, seed),
    }
    able = {name: _told_apart(lm, task) for name, task in asked.items()}
    ioi, colours, greater = (overlap.carried(lm, _pair(lm, task)) for task in asked.values())
    found, beside = (overlap.between(ioi, other, k, seed=seed) for other in (colours, greater))
    strong = [overlap.strongest(task.importance(), k) for task in (ioi, colours)]
    both = [head for head in strong[0] if head in strong[1]]
    spread = stats.hypergeom(heads, k, k)
    return Measured(
        values={"overlap": found.value} | {name: one[0] for name, one in able.items()},
        null={"chance": k / heads, "other_task": beside.value},
        interval={
            "overlap": (found.low, found.high),
            "other_task": (beside.low, beside.high),
            "chance": (spread.ppf(0.025) / k, spread.ppf(0.975) / k),
        }
        | {name: one[1:] for name, one in able.items()},
        n=PROMPTS,
        figure=label(
            [[task.importance()[head] for head in strong[0]] for task in (ioi, colours)],
            ("task", "component"),
            name="importance",
            method="circuits.overlap",
            provenance=lm.provenance,
            coords={"task": ["ioi", "colored_objects"], "component": _names(strong[0])},
        ),
        note=f"{len(both)} of {k} heads are shared: {', '.join(_names(both))}.",
    )


@claim(
    says="Forcing the inhibition heads of IOI onto the wrong colours repairs Colored Objects",
    where="abstract (from 49.6 % to 93.7 %)",
    read="abstract",
    tier="small",
    subjects=("smollm2", "qwen2.5-coder-0.5b"),
    n="96 prompts",
    valid="ioi_low > 0.5 and colours_low > 0.5 and plain <= 0.85",
    expect="gain_low >= 0.15 and gain_low > random_bound and harm_low > 0",
    direction="gain > random_bound",
    null={
        "random": "the gain by as many other heads of the same layers, 20 draws, each on a quarter "
        "of the prompts",
        "wrong_way": "the same heads forced onto the right colour",
    },
    thresholds="0.15: the specification's, the least gain that would matter; 0.85: room for it; a "
    "model that does a task tells its two prompts apart in more than half of the pairs",
    found_there={"plain": 0.496, "forced": 0.937},
)
def repair(lm: LM, seed: int) -> Measured:
    """On 24 pairs of IOI the three heads are found whose path to the logits carries most of the
    difference, and the four whose path to the queries of these does; they are forced, at the last
    token of 96 other prompts, onto the two colours that were not asked for. plain, forced: share of
    prompts whose right colour has the highest logit of the three. gain: forced less plain; harm:
    plain less wrong_way. wrong_name, right_name: what the forced heads attend to in IOI, at the
    last token."""
    ioi = tasks.task("ioi")(lm.tokenizer, FINDING, seed)
    made = tasks.task("colored_objects")(lm.tokenizer, ITEMS, seed)
    able = {"ioi": _told_apart(lm, ioi), "colours": _told_apart(lm, made)}
    movers, heads = _inhibitors(lm, ioi)
    asked = _colours(lm, made)
    plain, forced = _right(lm, asked), _right(lm, asked, heads, asked.wrong)
    harm = plain - _right(lm, asked, heads, asked.right)
    wrong_name, right_name = _attends(lm, ioi, heads)
    random = []
    for draw in range(DRAWS):
        part = slice(draw % PARTS, None, PARTS)
        others, some = _others(lm, heads, DRAWS * seed + draw), asked.part(part)
        random.append((_right(lm, some, others, some.wrong) - plain[part]).mean())
    return Measured(
        values={name: one[0] for name, one in able.items()}
        | {"wrong_name": wrong_name, "right_name": right_name},
        units={"plain": plain, "forced": forced, "gain": forced - plain, "harm": harm},
        null={"random": random, "wrong_way": (plain - harm).mean()},
        interval={name: one[1:] for name, one in able.items()},
        n=len(plain),
        note=f"Movers of IOI: {', '.join(_names(movers))}; forced, found through their queries: "
        f"{', '.join(_names(heads))}.",
    )


class Colours(NamedTuple):
    """Prompts about three coloured things: the ids of the right colour and of the two others,
    (example, 3), and where they stand."""

    prompts: list[str]
    ids: torch.Tensor
    right: list[list[int]]
    wrong: list[list[int]]

    def part(self, part: slice) -> Colours:
        return Colours(*(column[part] for column in self))


def _colours(lm: LM, asked: Task) -> Colours:
    prompts, ids, places = [str(prompt) for prompt in asked.clean], [], []
    for prompt, answer, row in zip(prompts, asked.answers, lm.batch(prompts).text[0].tolist()):
        shades = re.findall(r"\ba (\w+) \w+[,.]", prompt)
        shades.sort(key=lambda shade: shade != answer.strip())  # the right one first
        [*three] = (
            lm.tokenizer(f" {shade}", add_special_tokens=False)["input_ids"][0] for shade in shades
        )
        ids.append(three)
        places.append([row.index(token) for token in three])
    right, wrong = [row[:1] for row in places], [row[1:] for row in places]
    return Colours(prompts, torch.tensor(ids), right, wrong)


def _right(
    lm: LM, asked: Colours, heads: Sequence[Head] = (), keys: list[list[int]] | None = None
) -> np.ndarray:
    """Whether the right colour is the likeliest of the three, (example,), under forced heads."""
    if not heads:
        logits = last_logits(lm, asked.prompts)
    else:
        with force_attention.edit(lm, heads, keys=keys):
            logits = last_logits(lm, asked.prompts)
    best = logits.cpu().gather(1, asked.ids).argmax(dim=1)
    return (best == 0).double().numpy()


def _inhibitors(lm: LM, ioi: Task) -> tuple[list[Head], list[Head]]:
    """The heads that move the name to the logits, and those that tell these where not to look."""
    both = _pair(lm, ioi)
    movers = overlap.strongest(overlap.carried(lm, both).importance().clip(0), MOVERS)
    queries = [f"{name}.q" for name in _names(movers)]
    through = overlap.carried(lm, both, into=queries).importance().clip(0)
    through[tuple(np.transpose(movers))] = 0  # as in the authors' code, no receiver is a sender
    return movers, overlap.strongest(through, FORCED)


def _others(lm: LM, heads: Sequence[Head], seed: int) -> list[Head]:
    """As many other heads of each of these heads' layers."""
    drawn = drop_heads.edit(lm, heads, null=seed, same_layers=True).interventions
    return [(int(c.site.layer or 0), int(unit)) for c in drawn for unit in c.units or ()]


def _attends(lm: LM, ioi: Task, heads: Sequence[Head]) -> np.ndarray:
    """What heads attend to at the last token, all places of the foil and of the answer together."""
    ids = lm.batch(list(ioi.clean)).text[0].cpu()
    pattern = capture(lm, list(ioi.clean), "layers.*.attn.pattern", positions=-1)
    rows = torch.stack([pattern[f"layers.{a}.attn.pattern"][:, b] for a, b in heads]).cpu()
    named = (ids == torch.tensor(side)[:, None] for side in (ioi.foil_ids, ioi.answer_ids))
    return np.array([float((rows * there).sum(dim=-1).mean()) for there in named])


def _pair(lm: LM, task: Task) -> Pair:
    return pair(lm, task.clean, task.corrupt, task.answer_ids, task.foil_ids, "noise")


def _told_apart(lm: LM, asked: Task) -> tuple[float, float, float]:
    """In what share of pairs the answer gains on its foil from the corrupt prompt to the clean one,
    and its 95 % interval (Wilson's)."""
    share = float(tasks.accuracy(lm, asked).shift_accuracy)
    ends = stats.binomtest(round(share * len(asked)), len(asked)).proportion_ci(method="wilson")
    return share, ends.low, ends.high


def _names(heads: Sequence[Head]) -> list[str]:
    return [f"L{layer}H{head}" for layer, head in heads]
