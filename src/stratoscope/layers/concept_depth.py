"""Concept depth: how many layers a text must pass before a straight line can tell two kinds of
texts apart.

Paper: concept-depth

    accuracy[depth] = share of texts that a logistic regression on resid[depth, last token] puts
        right, held out
    jump_depth        = the first depth > 0 with accuracy[depth] / accuracy[depth - 1] >= 1 + rise
                          (rise = 0.1)
    convergence_depth = the first depth with accuracy[depth] >= max over depths of accuracy - within
        (within = 0.03)

depth counts the layers passed: 0 is the embedding of the last token. Each dimension is standardised
on the texts that the probe learns from; the penalty is |w|^2 / (2 * strength). Texts are cut into
`folds` parts, kinds in equal shares, once and alike for all depths; each part is judged by a probe
that learnt from the others. Texts of one group (a true and a false sentence about one country) stay
in one part: a probe that has seen the one is wrong about its twin, and accuracy falls below chance.
Three standard deviations below chance is refused.

The abstract leaves all of this open, and what "converged" means: the paper compares neighbouring
layers, which on noisy accuracies can say so early, so here it is nearness to the best.

null: the same probes on labels dealt out anew.
Reads as: from where on the concept lies open to a linear reader. Does not show that the model uses
it, and at chance the two depths mean nothing: look at accuracy against its null first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.results import dataset, label
from stratoscope.store.fitted import Fitted


def jump_depth(accuracy: Float[np.ndarray, " depth"], rise: float = 0.1) -> float:
    """The first depth whose accuracy is at least 1 + rise times the one before; NaN if there is
    none."""
    jumps = np.flatnonzero(accuracy[1:] >= (1 + rise) * accuracy[:-1] - 1e-9)
    return float(jumps[0] + 1) if len(jumps) else float("nan")


def convergence_depth(accuracy: Float[np.ndarray, " depth"], within: float = 0.03) -> float:
    """The first depth whose accuracy is at most `within` below the best."""
    return float(np.flatnonzero(accuracy >= accuracy.max() - within - 1e-9)[0])


@dataclass(frozen=True, eq=False, kw_only=True)
class Probes(Fitted):
    """One probe for each depth, learnt from all texts: logit = weight[depth] . resid + bias[depth].

    correct, null_correct: (example, depth), 1 where the held-out probe was right, with true and
    with dealt-out labels.
    """

    weight: Float[Tensor, "depth dim"]
    bias: Float[Tensor, " depth"]
    correct: Float[Tensor, "example depth"]
    null_correct: Float[Tensor, "example depth"]

    @property
    def result(self) -> xr.Dataset:
        """correct, null_correct (example, depth), accuracy, null (depth), and the two depths of the
        paper."""
        means = [x.mean(dim=0).double().numpy() for x in (self.correct, self.null_correct)]
        axes = ("example", "depth")
        return dataset(
            {
                "accuracy": (("depth",), means[0]),
                "null": (("depth",), means[1]),
                "jump_depth": ((), jump_depth(means[0])),
                "convergence_depth": ((), convergence_depth(means[0])),
                "correct": (axes, self.correct),
                "null_correct": (axes, self.null_correct),
            },
            method="layers.concept_depth",
            coords={"depth": list(range(len(self.bias)))},
            null_kind="the same probes on labels dealt out anew",
            provenance=self.provenance,
            settings=self.settings,
            seed=self.seed,
        )

    @torch.no_grad()
    def read(self, lm: LM, inputs: Any) -> xr.DataArray:
        """The probability of the second kind at every depth, of new texts: (example, depth)."""
        logit = (
            torch.einsum("end,nd->en", states(lm, inputs), self.weight.double())
            + self.bias.double()
        )
        coords = {"depth": list(range(len(self.bias)))}
        given = {"method": "layers.concept_depth", "provenance": lm.provenance, "coords": coords}
        return label(logit.sigmoid(), ("example", "depth"), name="probability", **given)


@torch.no_grad()
def fit(
    lm: LM,
    inputs: Any,
    *,
    labels: Sequence[int],
    groups: Sequence[Any] | None = None,
    folds: int = 5,
    strength: float = 0.01,
    batch: int = 16,
    seed: int = 0,
) -> Probes:
    """A probe at every depth, with its held-out answers and those of its null.

    inputs: texts, or their `states`, where several labels or parts are asked of the same ones.
    labels: 0 or 1 for each. groups: a name for each, alike for texts that share
    what they are about; such texts are held out together. folds: parts held out in turn.
    strength: inverse of the penalty, the same for every depth. batch: texts in one forward pass.
    seed: of the parts and of the dealt-out labels. Raises InputError when labels are not 0 and 1,
    one for each text, and at
    least `folds` of each; when there are fewer groups than folds; and when a depth is right far
    less often than chance, as it is when texts of different parts share something.
    """
    kinds = np.asarray(labels)
    counts = [int((kinds == kind).sum()) for kind in (0, 1)]
    if folds < 2 or kinds.ndim != 1 or sum(counts) != len(kinds) or min(counts) < folds:
        raise InputError(
            f"labels are 0 or 1 for each text, at least folds={folds} (2 or more) of each; got "
            f"{counts}."
        )
    read = inputs if isinstance(inputs, Tensor) and inputs.ndim == 3 else states(lm, inputs, batch)
    if len(read) != len(kinds):
        raise InputError(f"{len(kinds)} labels for {len(read)} texts: give one for each.")
    generator = np.random.default_rng(seed)
    dealt = generator.permutation(kinds)
    x, how = read.numpy(), (_parts(kinds, groups, folds, seed), strength)
    correct, null = (torch.tensor(_held_out(x, y, *how)).float() for y in (kinds, dealt))
    _refuse_below_chance(correct.mean(dim=0).numpy(), kinds)
    lines = [_line(at, kinds, strength) for at in x.swapaxes(0, 1)]
    return Probes(
        weight=torch.tensor(np.stack([w for w, _ in lines])).float(),
        bias=torch.tensor([b for _, b in lines]).float(),
        correct=correct,
        null_correct=null,
        provenance=lm.provenance,
        settings={
            "folds": folds,
            "strength": strength,
            "texts": len(kinds),
            "groups": 0 if groups is None else len(set(groups)),
        },
        seed=seed,
    )


@torch.no_grad()
def states(lm: LM, inputs: Any, size: int = 16) -> Float[Tensor, "example depth dim"]:
    """The last token's stream at every depth, texts of like length run together, `size` at once."""
    ids, mask = lm.batch(inputs).text
    rows = [row[real].tolist() for row, real in zip(ids, mask)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    last: list[Tensor] = [torch.empty(0)] * len(rows)
    for start in range(0, len(rows), size):
        some = order[start : start + size]
        seen = capture(
            lm, [rows[i] for i in some], "layers.0.resid_pre", "layers.*.resid_post", positions=-1
        )
        depths = torch.cat([seen["layers.0.resid_pre"][None], seen.stack("layers.*.resid_post")])
        for number, i in enumerate(some):
            last[i] = depths[:, number].double().cpu()
    return torch.stack(last)


def _line(
    x: Float[np.ndarray, "example dim"], kinds: Int[np.ndarray, " example"], strength: float
) -> tuple[Float[np.ndarray, " dim"], float]:
    """Weight and bias of one logistic regression, the standardisation folded into them."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-12] = 1.0  # a dimension that never varies says nothing, and divides by nothing
    line = LogisticRegression(C=strength, max_iter=1000).fit((x - mean) / scale, kinds)
    weight = line.coef_[0] / scale
    return weight, float(line.intercept_[0] - weight @ mean)


def _parts(
    kinds: Int[np.ndarray, " example"], groups: Sequence[Any] | None, folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(known, asked) texts of each part, kinds in equal shares and groups kept together."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    given = {"n_splits": folds, "shuffle": True, "random_state": seed}
    if groups is None:
        return list(StratifiedKFold(**given).split(kinds[:, None], kinds))
    if len(groups) != len(kinds) or len(set(groups)) < folds:
        raise InputError(
            f"groups name what each text is about, at least folds={folds} of them; got "
            f"{len(set(groups))} for {len(groups)} of {len(kinds)} texts."
        )
    parts = list(StratifiedGroupKFold(**given).split(kinds[:, None], kinds, np.asarray(groups)))
    if any(len(set(kinds[known])) < 2 for known, _ in parts):
        raise InputError(
            "with these groups held out together, some probe would learn from one kind alone: "
            "take fewer folds, or groups that hold both kinds."
        )
    return parts


def _refuse_below_chance(
    accuracy: Float[np.ndarray, " depth"], kinds: Int[np.ndarray, " example"]
) -> None:
    """Chance is what guessing by the shares of the two kinds gives."""
    share = kinds.mean()
    chance = share**2 + (1 - share) ** 2
    least = chance - 3 * (chance * (1 - chance) / len(kinds)) ** 0.5
    depth = int(accuracy.argmin())
    if accuracy[depth] < least:
        raise InputError(
            f"at depth {depth} the held-out probe is right for {accuracy[depth]:.2f} of the texts, "
            f"where guessing gives {chance:.2f}: texts of different parts share something that "
            "turns the label round. Name with `groups=` what each text is about."
        )


def _held_out(
    states: Float[np.ndarray, "example depth dim"],
    kinds: Int[np.ndarray, " example"],
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
    strength: float,
) -> np.ndarray:
    """Whether each text was put right at each depth by a probe that had not seen it: (example,
    depth)."""
    right = np.zeros(states.shape[:2], dtype=bool)
    for known, held_out in parts:
        for depth in range(states.shape[1]):
            weight, bias = _line(states[known, depth], kinds[known], strength)
            right[held_out, depth] = (states[held_out, depth] @ weight + bias > 0) == (
                kinds[held_out] == 1
            )
    return right
