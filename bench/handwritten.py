"""A residual sweep written by hand for Llama: what the planner would be if it knew one architecture
and one kind of cell.

The yardstick for the price of generality: the same sharing (start at the layer, suffix, packed
rows, last row of the last layer, logits once), with the model's weights used directly and no hook,
seam, plan, wave or check anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from stratoscope.engine.linear import FastLinear


@torch.no_grad()
def residual_sweep(
    model: torch.nn.Module, ids: Tensor, source: Tensor, words: tuple[int, int]
) -> Tensor:
    """Put source[layer, 0, position] into resid_pre of the run on ids, (layer, position) -> logit
    difference at the end.

    ids (1, position); source (layer, 1, position, dim).
    """
    body, config = model.model, model.config
    heads, shared = (
        config.num_attention_heads,
        config.num_attention_heads // config.num_key_value_heads,
    )
    length = ids.shape[1]
    cos, sin = (x[0] for x in body.rotary_emb(source[0], torch.arange(length)[None]))

    def norm(x: Tensor, module: torch.nn.Module) -> Tensor:
        return (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * module.weight
        )

    def turned(x: Tensor, at: Tensor) -> Tensor:  # (row, head, head_dim), rotated to its position
        one, two = x.chunk(2, dim=-1)
        return x * cos[at, None] + torch.cat([-two, one], dim=-1) * sin[at, None]

    def keys(x: Tensor, layer: torch.nn.Module, at: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (
            linear(x, p.weight).unflatten(-1, (-1, cos.shape[-1]))
            for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        return turned(k, at), v

    def finish(x: Tensor, z: Tensor, layer: torch.nn.Module) -> Tensor:
        x = x + linear(z, layer.self_attn.o_proj.weight)
        y, mlp = norm(x, layer.post_attention_layernorm), layer.mlp
        return x + linear(
            silu(linear(y, mlp.gate_proj.weight)) * linear(y, mlp.up_proj.weight),
            mlp.down_proj.weight,
        )

    mask = torch.ones(length, length, dtype=torch.bool).tril()
    clean, everywhere = body.embed_tokens(ids)[0], torch.arange(length)
    # by first position: (job, own, dim)
    rows = [clean.new_empty(0, length - p, clean.shape[1]) for p in range(length)]
    with FastLinear():
        for number, layer in enumerate(body.layers):
            last = number == len(body.layers) - 1
            y = norm(clean, layer.input_layernorm)
            q = turned(
                linear(y, layer.self_attn.q_proj.weight).unflatten(-1, (heads, -1)), everywhere
            )
            base = keys(y, layer, everywhere)
            z = _attend(q[None], *(x[None] for x in base), mask, shared)
            following = finish(clean, z[0], layer)
            for p in range(length):  # the cells of this layer join
                new = clean[None, p:].clone()
                new[0, 0] = source[number, 0, p]
                rows[p] = torch.cat([rows[p], new])
            sizes = [part.shape[:2] for part in rows]
            flat = torch.cat([part.flatten(0, 1) for part in rows])
            at = torch.cat(
                [torch.arange(p, length).repeat(jobs) for p, (jobs, _) in enumerate(sizes)]
            )
            y = norm(flat, layer.input_layernorm)
            k, v = keys(y, layer, at)
            if last:
                ends = at == length - 1
                flat, y, at = flat[ends], y[ends], at[ends]
                sizes = [(jobs, 1) for jobs, _ in sizes]
            q = turned(linear(y, layer.self_attn.q_proj.weight).unflatten(-1, (heads, -1)), at)
            found, of_q, of_k = [], 0, 0
            for p, (jobs, own) in enumerate(sizes):
                span, counted = (
                    slice(of_k, of_k + jobs * (length - p)),
                    slice(of_q, of_q + jobs * own),
                )
                mine = (x[span].unflatten(0, (jobs, -1)) for x in (k, v))
                both = (
                    torch.cat([c[:p].expand(jobs, -1, -1, -1), o], dim=1)
                    for c, o in zip(base, mine)
                )
                found.append(
                    _attend(
                        q[counted].unflatten(0, (jobs, -1)), *both, mask[length - own :], shared
                    ).flatten(0, 1)
                )
                of_q, of_k = counted.stop, span.stop
            flat = finish(flat, torch.cat(found), layer)
            rows = [
                x.unflatten(0, size)
                for x, size in zip(flat.split([a * b for a, b in sizes]), sizes)
            ]
            clean = following
        end = norm(torch.cat([part[:, -1] for part in rows]), body.norm)
        logits = torch.cat(
            [linear(part, model.lm_head.weight)[:, list(words)] for part in end.split(256)]
        )
    difference = (logits[:, 0] - logits[:, 1]).unflatten(0, (length, len(body.layers)))
    return difference.T


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, shared: int) -> Tensor:
    """q (job, query, head, head_dim); k, v (job, key, kv_head, head_dim) -> (job, query, head *
    head_dim)."""
    # query heads that share keys: more queries
    q = q.transpose(1, 2).unflatten(1, (-1, shared)).flatten(2, 3)
    z = scaled_dot_product_attention(
        q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask.repeat(shared, 1)
    )
    return z.unflatten(2, (shared, -1)).permute(0, 3, 1, 2, 4).flatten(2)
