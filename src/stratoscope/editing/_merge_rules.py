"""How the task vectors of one tensor become one: pure functions of (task, *shape) in float32.

    trimmed   tau[task] where it is among the largest `density` of its tensor in size, else 0
    dropped   tau[task] / density with probability `density`, else 0: the same mean   (DARE)
    summed    sum over tasks of weight tau                                            (arithmetic)
    averaged  sum of weight tau / sum of weight                                       (linear)
    elected   sign = that of sum over tasks;  the mean of the tasks that have it      (TIES)

With weights of 1 `elected` is as in its paper. Other weights mean one of two things: shares, as in
mergekit (the sign is that of sum weight tau, and it is sum weight tau / sum weight over those that
have it), or factors, as in PEFT (the sign is that of sum tau, and weighted ones are divided by how
many have it). Densities are of each tensor, as in both; TIES's paper takes them of all weights
together, DARE's draws are the same in all three.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.errors import InputError

METHODS = ("linear", "task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties")
DROPPING = METHODS[2:]
DENSITY = 0.2  # TIES's paper keeps a fifth

Taus = Float[Tensor, "task *shape"]
Tau = Float[Tensor, "*shape"]
Shares = Float[Tensor, " task"]


def trimmed(taus: Taus, density: float) -> Taus:
    """The largest of each task in size, at least one; of equal ones any."""
    flat = taus.flatten(1) if taus.ndim > 1 else taus[:, None]
    if density >= 1 or not flat.shape[1]:
        return taus
    few = max(1, int(density * flat.shape[1]))
    chosen = flat.abs().topk(few, dim=1).indices
    return torch.zeros_like(flat).scatter(1, chosen, flat.gather(1, chosen)).view_as(taus)


def dropped(taus: Taus, density: float, generator: torch.Generator) -> Taus:
    """Each number kept by chance, and made larger by as much. The chance is the CPU's, whatever
    the tensor is on; tasks draw one after the other."""
    if density >= 1:
        return taus
    odds = torch.full(taus.shape[1:], density)
    keep = torch.stack([torch.bernoulli(odds, generator=generator) for _ in taus])
    return taus * keep.to(taus) / density


def summed(taus: Taus, weights: Shares) -> Tau:
    return torch.einsum("t...,t->...", taus, weights.to(taus))


def averaged(taus: Taus, weights: Shares) -> Tau:
    return summed(taus, weights) / weights.sum().to(taus)


def elected(taus: Taus, weights: Shares, *, shares: bool = True) -> Tau:
    """The mean of those that agree with the sign of the sum; 0 counts for no sign, and a sum of 0
    is taken as positive."""
    weighted = taus * weights.to(taus).view(-1, *[1] * (taus.ndim - 1))
    total = (weighted if shares else taus).sum(dim=0)
    sign = torch.where(total >= 0, 1, -1).to(taus)
    agree = (weighted if shares else taus).sign() == sign
    if shares:
        over = summed(agree.to(taus), weights)
        over = torch.where(over == 0, 1, over)
    else:
        over = agree.sum(dim=0).clamp_min(1)
    return (weighted * agree).sum(dim=0) / over


def mixed(
    taus: Taus,
    weights: Shares,
    method: str,
    *,
    density: float = DENSITY,
    shares: bool = True,
    generator: torch.Generator | None = None,
) -> Tau:
    """One vector of several by a method's name; generator: for DARE."""
    if method.startswith("dare"):
        taus = dropped(taus, density, generator or torch.Generator().manual_seed(0))
    elif method in DROPPING:
        taus = trimmed(taus, density)
    if method == "linear":
        return averaged(taus, weights)
    if method.endswith("ties"):
        return elected(taus, weights, shares=shares)
    return summed(taus, weights)


def checked(method: str, density: float | None, weights: Shares) -> float:
    """The density to take. Raises InputError for an unknown method, a density outside (0, 1] or
    where nothing is dropped, and weights that are no numbers or sum to nothing."""
    if method not in METHODS:
        raise InputError(f"method={method!r}: choose one of {', '.join(METHODS)}.")
    if density is not None and method not in DROPPING:
        raise InputError(f"density={density:g}: {method} drops nothing, so leave it out.")
    if density is not None and not 0 < density <= 1:
        raise InputError(f"density={density:g}: the share that is kept is above 0 and at most 1.")
    if not bool(weights.isfinite().all()) or (method == "linear" and not float(weights.sum())):
        raise InputError(f"weights={weights.tolist()}: give numbers, whose sum is not 0 in a mean.")
    return DENSITY if density is None else density
