"""The search for a mask: which weights of a model are enough for it to say what a target does.

    m[weight]  = sigmoid(growth^step s[weight])        s: searched for, 0 at first
    loss       = - sum_v target(v) log p(v; weights w m) + sparsity / N * sum m     N: all weights
    keep       = s > 0

Continuous sparsification (Savarese, Silva and Maire, 2020). The model's own weights stay as they
are. The search ends early once the weights with 0.1 < m < 0.9 are fewer than a hundredth of those
above 0.9: then w m and w keep are almost the same model. It goes on, bit for bit, where it was
killed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from stratoscope.engine.gradients import frozen
from stratoscope.engine.masks import Mask, matrices
from stratoscope.engine.progress import shown
from stratoscope.engine.train import Recipe, train
from stratoscope.errors import InputError, SiteError
from stratoscope.models import source
from stratoscope.models.lm import LM

# ids (example, position) -> what should come next at each (example, position, vocab)
Target = Callable[[Tensor], Tensor]
# the token ids that are shown at a step
Batches = Callable[[int], Sequence[Sequence[int]]]
DECIDED = math.log(0.9 / 0.1)  # beta s of a weight with m = 0.9
UNDECIDED = 0.01  # of those above it


def train_mask(
    lm: LM,
    batches: Batches,
    target: Target,
    *,
    sparsity: float = 10.0,
    rate: float = 1e-2,
    growth: float = 1.005,
    steps: int = 800,
    seed: int = 0,
    folder: Path | None = None,
) -> Mask:
    """The mask under which the model says what `target` does.

    batches(step): the token ids shown at a step, one row for each text. target: of ids (example,
    position) the distribution of what should come next, (example, position, vocab). sparsity: what
    keeping all weights costs, in nats. rate: of Adam on s. growth: of the steepness beta, step by
    step. folder: where a search that was killed goes on. Raises SiteError for a model that does not
    predict the next token, InputError for settings that cannot be and for a loss that stops being a
    number.
    """
    refuse(lm)
    if steps < 1 or sparsity < 0 or rate <= 0 or growth < 1:
        raise InputError(
            f"steps={steps}, sparsity={sparsity}, rate={rate}, growth={growth}: one step at least, "
            "a sparsity of 0 or more, a rate above 0 and a growth of 1 or more."
        )
    found = matrices(lm)
    scores = Scores(matrix.weight for matrix in found.values())

    def loss(_: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        batch = lm.batch([list(row) for row in batches(step)])
        masks = scores.masks(growth**step)
        ids, real = batch.text
        logits = masked_logits(lm, batch, dict(zip(found, masks)))
        kept = torch.stack([mask.sum() for mask in masks]).sum() / scores.size
        return cross_entropy(logits, target(ids), real) + sparsity * kept

    recipe = Recipe(
        scores,
        loss,
        save=None,
        judge=None,
        steps=steps,
        rate=rate,
        decay=0.0,
        betas=(0.9, 0.999),
        clip=None,
        training=False,
        schedule=lambda step: rate,
        after=lambda _, step: scores.settled(growth ** (step - 1)),
    )  # fmt: skip
    with frozen(lm), shown("searching weights") as progress:
        try:
            story = train(recipe, folder, seed=seed, progress=progress)
        except ArithmeticError as error:
            raise InputError(f"{error}: lower the rate, which is {rate}.") from error
    undecided = float(scores.undecided(growth ** (story.step - 1))[0]) / scores.size
    settings = {"sparsity": sparsity, "rate": rate, "growth": growth, "steps": steps}
    return Mask(
        keep={name: s.detach() > 0 for name, s in zip(found, scores.each)},
        story={"steps": story.step, "undecided": undecided, "curve": story.curve},
        settings=settings,
        seed=seed,
        provenance=lm.provenance,
    )


class Scores(nn.Module):
    """s of every weight, in float32."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        starts = (torch.zeros_like(w, dtype=torch.float32) for w in weights)
        self.each = nn.ParameterList(nn.Parameter(start) for start in starts)

    @property
    def size(self) -> int:
        return sum(s.numel() for s in self.each)

    def masks(self, beta: float) -> list[Tensor]:
        return [torch.sigmoid(beta * s) for s in self.each]

    def undecided(self, beta: float) -> Tensor:
        """How many weights have 0.1 < m < 0.9, and how many m >= 0.9: (2,)."""
        above = torch.stack([(beta * s >= DECIDED).sum() for s in self.each]).sum()
        below = torch.stack([(beta * s <= -DECIDED).sum() for s in self.each]).sum()
        return torch.stack([self.size - above - below, above])

    def settled(self, beta: float) -> bool:
        between, above = self.undecided(beta).tolist()
        return between < UNDECIDED * above


class _Run(nn.Module):
    """The model as the house runs it, as a module that `functional_call` takes."""

    def __init__(self, lm: LM) -> None:
        super().__init__()
        self.model, self.call = lm.model, lm

    def forward(self, batch: Any) -> Tensor:
        return self.call(batch)["logits"]


def masked_logits(
    lm: LM, inputs: Any, masks: Mapping[str, Tensor]
) -> Float[Tensor, "example position vocab"]:
    """Logits of the model whose weights are multiplied by these, with gradients to the masks."""
    own = dict(lm.model.named_parameters())
    weights = {f"model.{n}": own[n].detach() * m.to(own[n].dtype) for n, m in masks.items()}
    return torch.func.functional_call(_Run(lm), weights, (lm.batch(inputs),))


def cross_entropy(
    logits: Float[Tensor, "example position vocab"],
    target: Float[Tensor, "example position vocab"],
    counted: Bool[Tensor, "example position"],
) -> Float[Tensor, ""]:
    """Mean over the counted positions of - sum_v target(v) log p(v), in nats."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    said = (target * wide.log_softmax(dim=-1)).sum(dim=-1)
    return -said[counted].mean()


def refuse(lm: LM) -> None:
    """Raises SiteError for a model that does not predict the next token of a text."""
    tower = lm.family.towers[""]
    if not tower.causal or not lm.family.reads_text or not lm.layout.head:
        raise SiteError(
            f"{lm.family.name} does not predict the next token: there is nothing to train it "
            "towards."
        )
    source.refuse(lm, "a text alone has no next token here")
