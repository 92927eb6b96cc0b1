"""What a tuned lens is fitted with: texts in windows, the streams of a run, and the affine maps
while they are learnt."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.engine.harvest import begins
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.layers._tuned import translated
from stratoscope.layers.logit_lens import SITES
from stratoscope.models.batch import Batch
from stratoscope.models.inputs import rows_of
from stratoscope.models.lm import LM

_LOGITS = 2**26  # bytes of one depth's logits that are held at once


def divergence(
    own: Float[Tensor, "*rows vocab"], said: Float[Tensor, "*rows vocab"]
) -> Float[Tensor, "*rows"]:
    """KL(own || said) of what logits say, in nats."""
    wide = own.float().log_softmax(dim=-1)
    return (wide.exp() * (wide - said.float().log_softmax(dim=-1))).sum(dim=-1)


class Translators(nn.Module):
    """A and b while they are learnt, in float32; at first 0."""

    def __init__(self, depths: int, dim: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(depths, dim, dim, device=device))
        self.bias = nn.Parameter(torch.zeros(depths, dim, device=device))

    def loss(self, lm: LM, streams: list[Tensor]) -> Tensor:
        """The mean divergence of streams (token, dim), one for each depth, the last the model's
        own.

        One depth's logits are held at a time: its gradients are taken at once, and what is given
        back has the loss's value and these gradients.
        """
        grads = [torch.zeros_like(part) for part in (self.weight, self.bias)]
        count, total = len(streams[-1]) * len(self.weight), self.bias.new_zeros(())
        for rows in torch.arange(len(streams[-1])).split(at_once(lm)):
            some = slice(int(rows[0]), int(rows[-1]) + 1)
            own = lm.readout(streams[-1][some])
            for depth, stream in enumerate(streams[:-1]):
                parts = self.weight[depth], self.bias[depth]
                said = lm.readout(translated(stream[some], *parts))
                missed = divergence(own, said).sum() / count
                for whole, grad in zip(grads, torch.autograd.grad(missed, parts)):
                    whole[depth] += grad
                total = total + missed.detach()
        pairs = zip((self.weight, self.bias), grads)
        # each difference is 0, with the gradient that was taken
        return total + torch.stack([((p - p.detach()) * grad).sum() for p, grad in pairs]).sum()


@torch.no_grad()
def streams(lm: LM, batch: Batch) -> list[Float[Tensor, "token dim"]]:
    """What stands at every depth, all real tokens of the batch one after another."""
    seen, (_, real) = capture(lm, batch, *SITES), batch.text
    return [seen[site][real.to(seen[site].device)] for site in lm.layout.resolve(SITES)]


def windows(lm: LM, texts: Any, context: int) -> list[list[int]]:
    """Texts in windows of at most `context` tokens, each with what the tokenizer begins with."""
    bos, limit = begins(lm), lm.context
    if context <= len(bos) or (limit is not None and context > limit):
        raise InputError(
            f"context={context}: a window has at least one token beside BOS, and this model takes "
            f"{limit or 'any number of'} tokens at most."
        )
    given = rows_of(texts, lm.tokenizer)
    rows = [row[len(bos) :] if bos and row[: len(bos)] == bos else row for row in given]
    room = context - len(bos)
    return [[*bos, *row[at : at + room]] for row in rows for at in range(0, len(row), room)]


def at_once(lm: LM) -> int:
    """So many tokens are read out at once."""
    return max(1, _LOGITS // (4 * lm.dims.vocab))
