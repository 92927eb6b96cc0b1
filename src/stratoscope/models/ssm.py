"""State-space mixers written out: what a Mamba or Mamba-2 layer makes of its `ssm.` sites, step by
step.

    x, B, C = convolved(ssm.in)                     and, of Mamba-2, B and C before the convolution
    h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] x[t]
    ssm.z[t] = (C[t] h[t] + D x[t]) * silu(ssm.gate[t])                of Mamba-2 through a norm too

delta, B and C are made of the token (Mamba: of what the convolution gives; Mamba-2: of the stream),
so that a layer chooses what it writes into its state h. A and D are the layer's own. This is the
recurrence of the papers, position after position, where Transformers scans chunks or calls a
kernel: the proof of a family (`prove`) compares the two, and so finds a site misnamed.

Papers: Gu and Dao, "Mamba", 2023; Dao and Gu, "Transformers are SSMs", 2024
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad, softplus


def written_out(
    layer: Any,
    stream: Float[Tensor, "example position dim"],
    given: Float[Tensor, "example position channel"],
    gate: Float[Tensor, "example position channel"],
    delta: Float[Tensor, "example position head"] | None,
) -> Float[Tensor, "example position channel"]:
    """`ssm.z` of a Hugging Face layer, from its `resid_pre`, `ssm.in`, `ssm.gate`, `ssm.delta`
    (None in Mamba, which makes it of what its convolution gives)."""
    mixer = layer.mixer
    if delta is None:
        return _selective(mixer, given.float(), gate.float())
    made = mixer.in_proj(layer.norm(stream.to(layer.norm.weight.dtype)))
    return _dual(mixer, made.float(), given, gate, delta)


def scan(
    x: Float[Tensor, "example position head size"],
    delta: Float[Tensor, "example position head"],
    a: Float[Tensor, "head #state"],  # noqa: F821
    b: Float[Tensor, "example position #head state"],
    c: Float[Tensor, "example position #head state"],
    d: Float[Tensor, " head"],
) -> Float[Tensor, "example position head size"]:
    """C[t] h[t] + D x[t] at every position, with h[t] = exp(delta A) h[t-1] + delta B[t] x[t]."""
    held = x.new_zeros(len(x), *x.shape[2:], b.shape[-1])  # example, head, size, state
    outputs = []
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]
        written = (step[..., None] * x[:, t, ..., None]) * b[:, t, :, None]
        held = torch.exp(step * a)[:, :, None] * held + written
        outputs.append((held * c[:, t, :, None]).sum(dim=-1) + d[:, None] * x[:, t])
    return torch.stack(outputs, dim=1)


def _selective(mixer: Any, given: Tensor, gate: Tensor) -> Tensor:
    """Mamba: a state of its own for every channel."""
    x = mixer.act(_convolved(given, mixer.conv1d))
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    low, b, c = mixer.x_proj(x.to(mixer.x_proj.weight.dtype)).float().split(sizes, dim=-1)
    if hasattr(mixer, "rms_eps"):  # Falcon Mamba norms them, without a weight
        low, b, c = (_normed(part, mixer.rms_eps) for part in (low, b, c))
    delta = softplus(low @ mixer.dt_proj.weight.float().T + mixer.dt_proj.bias.float())
    a = -mixer.A_log.float().exp()
    y = scan(x[..., None], delta, a, b[:, :, None], c[:, :, None], mixer.D.float())[..., 0]
    return y * mixer.act(gate)


def _dual(mixer: Any, made: Tensor, given: Tensor, gate: Tensor, delta: Tensor) -> Tensor:
    """Mamba-2: a state for every channel of a head, all decaying alike. made: what the mixer's
    first projection gives; B and C are taken of it."""
    groups, size = mixer.n_groups, mixer.ssm_state_size
    start = 2 * mixer.intermediate_size
    chosen = made[..., start : start + 2 * groups * size]
    together = mixer.act(_convolved(torch.cat([given.float(), chosen], dim=-1), mixer.conv1d))
    x, b, c = together.split([mixer.intermediate_size, groups * size, groups * size], dim=-1)
    x = x.unflatten(-1, (mixer.num_heads, mixer.head_dim))
    each = mixer.num_heads // groups
    b, c = (y.unflatten(-1, (groups, size)).repeat_interleave(each, dim=2) for y in (b, c))
    step = softplus(delta.float() + mixer.dt_bias.float()).clamp(*mixer.time_step_limit)
    a = -mixer.A_log.float().exp()[:, None]
    y = scan(x, step, a, b, c, mixer.D.float()).flatten(2) * torch.nn.functional.silu(gate.float())
    y = _normed(y.unflatten(-1, (groups, -1)), mixer.norm.variance_epsilon).flatten(2)
    return y * mixer.norm.weight.float()


def _convolved(x: Tensor, convolution: Any) -> Tensor:
    """Each channel by itself, over its own and the earlier positions. x: (example, position,
    channel)."""
    taps = convolution.weight.float().squeeze(1)  # channel, tap: the last is of the position itself
    n = x.shape[1]
    before = pad(x, (0, 0, taps.shape[1] - 1, 0))
    shifted = [before[:, k : k + n] * taps[:, k] for k in range(taps.shape[1])]
    summed = torch.stack(shifted).sum(dim=0)
    return summed if convolution.bias is None else summed + convolution.bias.float()


def _normed(x: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + epsilon)
