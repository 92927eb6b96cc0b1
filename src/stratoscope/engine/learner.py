"""A sparse dictionary while it is learnt: its parameters and its loss.

    pre  = (x - b_dec) W_enc + b_enc
    y^   = z W_dec + b                     b = b_dec; of a transcoder, which writes elsewhere, b_out
    loss = |y - y^|^2 w + sparsity * price + silent

    relu              z = max(0, pre)                        price = sum z
    topk, batchtopk   z = the `sparsity` largest             no price
    jumprelu          z = pre where pre > threshold          price = how many z are above 0
    gated             z = max(0, exp(r_mag) (pre - b_enc) + b_mag) where pre > 0
                                                             price = sum max(0, pre)
                      and |y - max(0, pre) W_dec - b|^2 w is added, W_dec and b held

w is 1, and of a transcoder sqrt(dim) / |y|, so that a token's loss grows with the norm of what is
missed (Dunefsky et al., 2024). A jump's threshold is learnt as its logarithm, by the gradients of
`engine.jump`; a gate, which has no gradient, by its price and the last term (Rajamanoharan et al.,
2024: it asks of max(0, pre) alone that it says y, and so of the gate to open where it should).

silent = |missed - what silent features would add|^2 w / 32, of the dim / 2 that would add most
(Gao et al., 2024). A feature is silent when it has spoken at none of the last SILENT steps.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.engine.dictionary import Dictionary, Kind
from stratoscope.engine.jump import jump

SILENT = 50
# of a jump, where vectors have a norm of sqrt(dim), of which a random direction has a part of about
# 1: as in "Dictionary learning optimization techniques" (Conerly et al., 2025)
THRESHOLD, BANDWIDTH = 0.1, 2.0
_FOLLOW = 0.05  # how fast the threshold of batchtopk follows


class Learner(nn.Module):
    """A dictionary of vectors that are scaled already, with rows of W_dec of norm 1.

    y: what is to be written, of a transcoder; None where it is x.
    """

    threshold: Tensor
    silent: Tensor

    def __init__(
        self,
        x: Float[Tensor, "token dim"],
        width: int,
        kind: Kind,
        sparsity: float,
        y: Float[Tensor, "token out"] | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.sparsity = kind, sparsity
        rows = _rows(width, x if y is None else y)
        self.W_dec = nn.Parameter(rows)
        read = rows if y is None else _rows(width, x)
        self.W_enc = nn.Parameter(read.detach().T.contiguous())
        self.b_enc = nn.Parameter(x.new_zeros(width))
        self.b_dec = nn.Parameter(x.mean(dim=0))
        if y is not None:
            self.b_dec_out = nn.Parameter(y.mean(dim=0))
        if kind == "jumprelu":
            self.log_threshold = nn.Parameter(x.new_full((width,), THRESHOLD).log())
        if kind == "gated":
            self.r_mag = nn.Parameter(x.new_zeros(width))
            self.b_mag = nn.Parameter(x.new_zeros(width))
        self.register_buffer("threshold", x.new_zeros(()))
        self.register_buffer("silent", x.new_zeros(width))
        self.W_dec.register_hook(self._across)

    def forward(
        self,
        x: Float[Tensor, "row dim"],
        warm: float,
        y: Float[Tensor, "row out"] | None = None,
    ) -> Tensor:
        """The mean loss of some vectors. warm: the share of the sparsity that is asked already."""
        wanted, weight = (x, None) if y is None else (y, y.shape[1] ** 0.5 / _norm(y))
        # b_dec is taken away behind W_enc: its gradient is then a product with one row, not all
        pre = torch.addmm(self.b_enc - self.b_dec @ self.W_enc, x, self.W_enc)
        z, price = self._features(pre)
        bias = self.b_dec if y is None else self.b_dec_out
        missed = wanted - z @ self.W_dec - bias
        loss = _mean(missed, weight)
        if price is not None:
            loss = loss + warm * self.sparsity * price.sum(dim=-1).mean()
        if self.kind == "gated":
            loss = loss + self.auxiliary(pre, wanted - bias.detach(), weight)
        with torch.no_grad():
            self.silent.copy_(torch.where((z > 0).any(dim=0), 0.0, self.silent + 1))
            self._follow(z)
        return loss + self._silent(pre, missed.detach(), weight)

    def auxiliary(self, pre: Tensor, wanted: Tensor, weight: Tensor | None) -> Tensor:
        """What the gate alone misses, with the decoder held."""
        return _mean(wanted - pre.relu() @ self.W_dec.detach(), weight)

    def dictionary(self, scale: float, scale_out: float | None = None, **about: Any) -> Dictionary:
        """What was learnt, of vectors as they are: features count in units of what is written.

        scale: what x was multiplied by; scale_out: what y was, where it is not x.
        """
        out = scale if scale_out is None else scale_out
        values = {name: x.detach().clone() for name, x in self.named_parameters()}
        made = {name: x / out for name, x in values.items() if name[:2] == "b_"}
        made["b_dec"] = values["b_dec"] / scale
        made |= {name: values[name] for name in ("W_enc", "W_dec", "r_mag") if name in values}
        if scale_out is not None:
            # folded into the encoder, as the folder has no place for a transcoder's b_dec
            away = values["b_dec"] @ values["W_enc"] / out
            made["b_enc"] = made["b_enc"] - away
            if "b_mag" in made:
                made["b_mag"] = made["b_mag"] - away * values["r_mag"].exp()
            made["W_enc"] = values["W_enc"] * (scale / out)
            made["b_dec"] = torch.zeros_like(values["b_dec"])
        if self.kind == "batchtopk":
            made["threshold"] = self.threshold / out
        if self.kind == "jumprelu":
            made["threshold"] = values["log_threshold"].exp() / out
        return Dictionary(
            kind=self.kind, k=int(self.sparsity) if self.kind == "topk" else None, **made, **about
        )

    def normed(self) -> None:
        """Rows of norm 1 again, after a step."""
        self.W_dec.data /= self.W_dec.data.norm(dim=1, keepdim=True)

    def _features(self, pre: Tensor) -> tuple[Tensor, Tensor | None]:
        """The features, and what is paid for (row, feature), or None."""
        if self.kind == "jumprelu":
            return jump(pre, self.log_threshold.exp(), BANDWIDTH)
        if self.kind == "gated":
            size = self.r_mag.exp() * (pre - self.b_enc) + self.b_mag
            return size.relu() * (pre > 0), pre.relu()
        active = pre.relu()
        if self.kind == "relu":
            return active, active
        if self.kind == "topk":
            most = active.topk(int(self.sparsity), dim=-1, sorted=False)
            return torch.zeros_like(active).scatter(-1, most.indices, most.values), None
        most = active.flatten().topk(int(self.sparsity * len(active)), sorted=False)
        empty = torch.zeros_like(active).flatten()
        return empty.scatter(0, most.indices, most.values).view_as(active), None

    def _silent(self, pre: Tensor, missed: Tensor, weight: Tensor | None) -> Tensor:
        if not bool((self.silent >= SILENT).any()):  # the trainer waits for each step's loss anyway
            return _mean(missed, weight) / 32
        asleep = pre.masked_fill(self.silent < SILENT, -torch.inf)
        most = asleep.topk(min(missed.shape[1] // 2 + 1, pre.shape[1]), dim=-1)
        more = torch.zeros_like(pre).scatter(-1, most.indices, most.values.relu()) @ self.W_dec
        return _mean(missed - more, weight) / 32

    def _follow(self, z: Tensor) -> None:
        """Of batchtopk the least value that was chosen, as a running mean that begins with the
        first."""
        if self.kind == "batchtopk":
            least = torch.where(z > 0, z, torch.inf).min()
            moved = torch.where(self.threshold > 0, self.threshold.lerp(least, _FOLLOW), least)
            self.threshold.copy_(torch.where(least.isfinite(), moved, self.threshold))

    def _across(self, gradient: Tensor) -> Tensor:
        """The gradient without its part along each row."""
        rows = self.W_dec.detach()
        return gradient - (gradient * rows).sum(dim=1, keepdim=True) * rows


def _rows(width: int, like: Float[Tensor, "_ dim"]) -> Float[Tensor, "width dim"]:
    rows = torch.randn(width, like.shape[1], device=like.device)
    return rows / rows.norm(dim=1, keepdim=True)


def _norm(y: Tensor) -> Tensor:
    return y.norm(dim=-1).clamp_min(1e-6)


def _mean(missed: Float[Tensor, "row out"], weight: Float[Tensor, " row"] | None) -> Tensor:
    squared = missed.square().sum(dim=-1)
    return (squared if weight is None else squared * weight).mean()
