"""Learn a sparse dictionary of stored vectors, by the one trainer.

    loss = |x - y|^2 + sparsity * sum z        relu: the sum is what keeps features few
    loss = |x - y|^2                           topk, batchtopk: `sparsity` of them speak at a token
         + |x - y - y_silent|^2 / 32           what silent features would add of what is missed

Vectors are scaled to a mean norm of sqrt(dim), so that one sparsity and one rate mean the same at
every site; what is given back is a dictionary of the vectors as they are. Rows of W_dec have norm 1
and keep it: the gradient's part along a row is taken away, and what the step adds is scaled off. A
feature is silent when it has spoken at none of the last SILENT steps. Of batchtopk, whose choice
depends on a batch, what is kept is one threshold: the running mean of the least value that was
chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.engine.dictionary import Dictionary, Kind
from stratoscope.engine.progress import shown
from stratoscope.engine.train import Recipe, epoch_rows, train
from stratoscope.errors import InputError

LEARNT = ("relu", "topk", "batchtopk")
SPARSITY = {"relu": 1.0, "topk": 32.0, "batchtopk": 32.0}  # where none is said
SILENT = 50
_FOLLOW = 0.05  # how fast the threshold follows


class Learner(nn.Module):
    """A dictionary while it is learnt, of vectors that are scaled already."""

    threshold: Tensor
    silent: Tensor

    def __init__(self, x: Float[Tensor, "token dim"], width: int, kind: Kind, sparsity: float):
        super().__init__()
        self.kind, self.sparsity = kind, sparsity
        rows = torch.randn(width, x.shape[1], device=x.device)
        self.W_dec = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
        self.W_enc = nn.Parameter(self.W_dec.detach().T.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(width, device=x.device))
        self.b_dec = nn.Parameter(x.mean(dim=0))
        self.register_buffer("threshold", torch.zeros((), device=x.device))
        self.register_buffer("silent", torch.zeros(width, device=x.device))
        self.W_dec.register_hook(self._across)

    def forward(self, x: Float[Tensor, "row dim"], warm: float) -> Tensor:
        """The mean loss of some vectors. warm: the share of the sparsity that is asked already."""
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        z = self._chosen(pre.relu())
        missed = x - z @ self.W_dec - self.b_dec
        loss = missed.square().sum(dim=-1).mean()
        spoke = (z > 0).any(dim=0)
        with torch.no_grad():
            self.silent.copy_(torch.where(spoke, 0.0, self.silent + 1))
            self._follow(z)
        if self.kind == "relu":
            loss = loss + warm * self.sparsity * z.sum(dim=-1).mean()
        asleep = pre.masked_fill(self.silent < SILENT, -torch.inf)
        most = asleep.topk(min(x.shape[1] // 2 + 1, pre.shape[1]), dim=-1)
        more = torch.zeros_like(pre).scatter(-1, most.indices, most.values.relu()) @ self.W_dec
        return loss + (missed.detach() - more).square().sum(dim=-1).mean() / 32

    def dictionary(self, scale: float, **about: Any) -> Dictionary:
        """What was learnt, of vectors as they are: features count in their units."""
        values = {name: x.detach().clone() for name, x in self.named_parameters()}
        threshold = self.threshold / scale if self.kind == "batchtopk" else None
        return Dictionary(
            W_enc=values["W_enc"],
            b_enc=values["b_enc"] / scale,
            W_dec=values["W_dec"],
            b_dec=values["b_dec"] / scale,
            kind=self.kind,
            k=int(self.sparsity) if self.kind == "topk" else None,
            threshold=threshold,
            **about,
        )

    def normed(self) -> None:
        """Rows of norm 1 again, after a step."""
        self.W_dec.data /= self.W_dec.data.norm(dim=1, keepdim=True)

    def _chosen(self, active: Tensor) -> Tensor:
        if self.kind == "relu":
            return active
        if self.kind == "topk":
            most = active.topk(int(self.sparsity), dim=-1)
            return torch.zeros_like(active).scatter(-1, most.indices, most.values)
        most = active.flatten().topk(int(self.sparsity * len(active)))
        empty = torch.zeros_like(active).flatten()
        return empty.scatter(0, most.indices, most.values).view_as(active)

    def _follow(self, z: Tensor) -> None:
        """The least value that was chosen, as a running mean that begins with the first."""
        least = torch.where(z > 0, z, torch.inf).min()
        moved = torch.where(self.threshold > 0, self.threshold.lerp(least, _FOLLOW), least)
        self.threshold.copy_(torch.where(least.isfinite(), moved, self.threshold))

    def _across(self, gradient: Tensor) -> Tensor:
        """The gradient without its part along each row."""
        rows = self.W_dec.detach()
        return gradient - (gradient * rows).sum(dim=1, keepdim=True) * rows


def learn(
    x: Float[Tensor, "token dim"],
    *,
    width: int,
    kind: Kind,
    sparsity: int | float | None = None,
    steps: int,
    batch_size: int = 2048,
    rate: float = 1e-3,
    seed: int = 0,
    folder: Path | None = None,
    **about: Any,
) -> Dictionary:
    """A dictionary of `width` features of these vectors, on the device that they are on.

    sparsity: how much a feature's value costs (relu), or how many speak at a token (topk, and on
    average batchtopk). folder: where a training that is killed goes on. about: further fields of
    the dictionary. Raises InputError for settings that cannot be, or a loss that is no number.
    """
    wanted = SPARSITY.get(kind, 0.0) if sparsity is None else float(sparsity)
    _refuse(x, width, kind, wanted, steps, batch_size)
    scale = x.shape[1] ** 0.5 / float(x.float().norm(dim=1).mean())
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(seed)
        learner = Learner(x.float() * scale, width, kind, wanted)
    warmup = max(1, steps // 20)

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        rows = epoch_rows(len(x), batch_size, step, seed).to(x.device)
        return model(x[rows].float() * scale, min(1.0, (step + 1) / warmup))

    after: Callable[[nn.Module, int], object] = lambda model, step: learner.normed()  # noqa: E731
    recipe = Recipe(
        learner, loss, None, None, steps, rate,
        warmup=warmup, decay=0.0, betas=(0.9, 0.999), after=after,
    )  # fmt: skip
    with shown(f"training a {kind} dictionary") as progress:
        try:
            train(recipe, folder, seed=seed, progress=progress)
        except ArithmeticError as error:
            raise InputError(f"{error}: lower the rate, which is {rate}.") from error
    return learner.dictionary(scale, **about)


def _refuse(x: Tensor, width: int, kind: str, sparsity: float, steps: int, batch_size: int) -> None:
    if kind not in LEARNT:
        known = ", ".join(one for one in get_args(Kind) if one not in LEARNT)
        raise InputError(
            f"kind {kind!r} is not trained here: choose {', '.join(LEARNT)}. (Dictionaries of kind "
            f"{known} can be loaded and used.)"
        )
    few = kind == "relu" or 1 <= sparsity <= width
    if width < 1 or steps < 1 or sparsity <= 0 or not few:
        raise InputError(
            f"width={width}, sparsity={sparsity:g}, steps={steps}: a {kind} dictionary has 1 or "
            "more features and steps, and a sparsity above 0"
            + ("." if kind == "relu" else ", of no more features than there are.")
        )
    if not 1 <= batch_size <= len(x):
        raise InputError(
            f"a batch of {batch_size} vectors cannot be drawn from {len(x)}: give more tokens, or "
            "a smaller batch_size."
        )
