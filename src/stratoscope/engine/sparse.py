"""Learn a sparse dictionary of stored vectors, by the one trainer.

    loss = |x - y|^2 + sparsity * price         relu, jumprelu, gated: what features cost
    loss = |x - y|^2                            topk, batchtopk: `sparsity` of them speak at a token
         + |x - y - y_silent|^2 / 32            what silent features would add of what is missed

`engine.learner` has every kind's formula. Vectors are scaled to a mean norm of sqrt(dim), so that
one sparsity and one rate mean the same at every site; what is given back is a dictionary of the
vectors as they are. Rows of W_dec have norm 1 and keep it: the gradient's part along a row is taken
away, and what the step adds is scaled off. Of batchtopk, whose choice depends on a batch, what is
kept is one threshold: the running mean of the least value that was chosen. With `y` what is learnt
is a transcoder: it reads x and writes y.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.engine.dictionary import Dictionary, Kind
from stratoscope.engine.learner import Learner
from stratoscope.engine.progress import shown
from stratoscope.engine.train import Recipe, epoch_rows, train
from stratoscope.errors import InputError

# where none is said: of some how many speak, of others what one costs
SPARSITY = {"relu": 1.0, "topk": 32.0, "batchtopk": 32.0, "jumprelu": 1.0, "gated": 1.0}
_COUNTED = ("topk", "batchtopk")
_THRESHOLDS = 10.0  # times the rate: a logarithm has further to go than a weight


def learn(
    x: Float[Tensor, "token dim"],
    y: Float[Tensor, "token out"] | None = None,
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

    y: what it is to write, token by token; None: x itself. sparsity: what a feature's value costs
    (relu, gated), what its speaking costs, as a squared error (jumprelu), or how many speak at a
    token (topk, and on average batchtopk). folder: where a training that is killed goes on. about:
    further fields of the dictionary. Raises InputError for settings that cannot be, or a loss that
    is no number.
    """
    wanted = SPARSITY.get(kind, 0.0) if sparsity is None else float(sparsity)
    _refuse(x, y, width, kind, wanted, steps, batch_size)
    scale, out = _scale(x), None if y is None else _scale(y)
    target = None if y is None or out is None else y.float() * out
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(seed)
        learner = Learner(x.float() * scale, width, kind, wanted, target)
    warmup = max(1, steps // 20)

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        rows = epoch_rows(len(x), batch_size, step, seed).to(x.device)
        warm = min(1.0, (step + 1) / warmup)
        return model(x[rows].float() * scale, warm, None if target is None else target[rows])

    after: Callable[[nn.Module, int], object] = lambda model, step: learner.normed()  # noqa: E731
    rates = {"log_threshold": _THRESHOLDS} if kind == "jumprelu" else {}
    recipe = Recipe(
        learner, loss, None, None, steps, rate,
        warmup=warmup, decay=0.0, betas=(0.9, 0.999), after=after, rates=rates,
    )  # fmt: skip
    with shown(f"training a {kind} dictionary") as progress:
        try:
            train(recipe, folder, seed=seed, progress=progress)
        except ArithmeticError as error:
            raise InputError(f"{error}: lower the rate, which is {rate}.") from error
    return learner.dictionary(scale, out, **about)


def _scale(x: Tensor) -> float:
    return x.shape[1] ** 0.5 / float(x.float().norm(dim=1).mean())


def _refuse(
    x: Tensor, y: Tensor | None, width: int, kind: str, sparsity: float, steps: int, batch_size: int
) -> None:
    if kind not in SPARSITY:
        raise InputError(f"kind {kind!r}: a dictionary is one of {', '.join(get_args(Kind))}.")
    counted = kind in _COUNTED
    if width < 1 or steps < 1 or sparsity <= 0 or (counted and not 1 <= sparsity <= width):
        raise InputError(
            f"width={width}, sparsity={sparsity:g}, steps={steps}: a {kind} dictionary has 1 or "
            "more features and steps, and a sparsity above 0"
            + (", of no more features than there are." if counted else ".")
        )
    if not 1 <= batch_size <= len(x):
        raise InputError(
            f"a batch of {batch_size} vectors cannot be drawn from {len(x)}: give more tokens, or "
            "a smaller batch_size."
        )
    if y is not None and len(y) != len(x):
        raise InputError(
            f"{len(x)} vectors to read and {len(y)} to write: a transcoder learns from pairs."
        )
