"""Sweeps written by hand for Llama: what the planner would be if it knew one architecture and one
kind of cell.

The yardsticks for the price of generality, with no hook, seam, plan or check anywhere:

    residual_sweep   on a CPU, for a residual sweep of one prompt: products of rows that are live,
                     one attention call for each first position, the model's weights used directly;
    dense_sweep      for a device where calls cost more than arithmetic: all indices made once, one
                     attention call a layer, on the model's own submodules; several prompts, heads;
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

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


# --- one attention call a layer -------------------------------------------------------------------


@torch.no_grad()
def dense_sweep(
    model: Any,
    ids: Tensor,
    lengths: Tensor,
    source: Tensor,
    cells: Tensor,
    words: tuple[int, int],
    *,
    at_once: int = 4096,
) -> Tensor:
    """(cell, example) logit difference at each example's last token, with one patch each.

    ids (example, position), right-padded; lengths (example,), on the host. source: what is put
    there, (draw, layer, example, position, dim) for resid_pre at one position of a layer, or (draw,
    layer, example, position, head, head_dim) for z of one head at all positions. cells (cell, 3),
    on the host: draw, layer, and position or head. at_once: how many cells (on one example each) go
    through the layers together.
    """
    draw, layer, place = cells.T
    examples, per_head = len(ids), source.ndim == 6
    base = _Base(model, ids, lengths, torch.tensor(words, device=ids.device))
    result = base.difference(base.ends).expand(len(cells), examples).clone()
    first = torch.zeros_like(place) if per_head else place
    cell, example = (first[:, None] < lengths).nonzero(as_tuple=True)
    order = layer[cell].argsort(stable=True)
    for some in order.split(at_once):
        cells_here, on = cell[some], example[some]
        jobs = torch.stack([draw[cells_here], layer[cells_here], on, place[cells_here]])
        put = _heads_put if per_head else _residuals_put
        ends = put(base, source, jobs, first[cells_here])
        result[cells_here, on] = base.difference(ends)
    return result


class _Base:
    """The unchanged run: what enters each layer (row, dim), keys and values (example, position,
    head, head_dim) of each, and the last row of each example."""

    def __init__(self, model: Any, ids: Tensor, lengths: Tensor, words: Tensor) -> None:
        self.model, self.lengths, self.shape, self.words = model, lengths, ids.shape, words
        self.reads = lengths - 1
        x = model.model.embed_tokens(ids)
        everywhere = torch.arange(ids.shape[1], device=ids.device)
        self.angles = [a[0] for a in model.model.rotary_emb(x, everywhere[None])]
        rows = everywhere.repeat(len(ids))
        self.entries, self.keys, self.values = [], [], []
        x = x.flatten(0, 1)
        for layer in model.model.layers:
            self.entries.append(x)
            q, k, v = (y.unflatten(0, self.shape) for y in self.project(layer, x, rows))
            self.keys.append(k)
            self.values.append(v)
            x = self.finish(layer, x, _causal(q, k, v).flatten(0, 1))
        each = torch.arange(len(ids)) * ids.shape[1]
        self.ends = x[(each + self.reads).to(x.device)]

    def project(self, layer: Any, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(row, dim) -> q, k and v, each (row, head, head_dim)."""
        part, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            p(y).unflatten(1, (-1, part.head_dim)) for p in (part.q_proj, part.k_proj, part.v_proj)
        )
        return *apply_rotary_pos_emb(q, k, *(a[position] for a in self.angles)), v

    def finish(self, layer: Any, x: Tensor, z: Tensor) -> Tensor:
        """The layer's output from its entry (row, dim) and z (row, head, head_dim)."""
        x = x + layer.self_attn.o_proj(z.flatten(1))
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def difference(self, ends: Tensor) -> Tensor:
        parts = self.model.model.norm(ends).split(256)  # logits are wide
        chosen = [self.model.lm_head(part).index_select(1, self.words) for part in parts]
        chosen = torch.cat(chosen).float()
        return chosen[:, 0] - chosen[:, 1]


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(job, position, head, head_dim) of all jobs in one call."""
    z = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    return z.transpose(1, 2)


class _Rows:
    """Live rows of jobs that begin one after another: of each the job, example and position."""

    def __init__(self, base: _Base, jobs: Tensor, first: Tensor, device: torch.device) -> None:
        self.base, layers = base, len(base.entries)
        layer, example = jobs[1], jobs[2]
        size = base.lengths[example] - first
        start = size.cumsum(0) - size
        job = torch.repeat_interleave(torch.arange(len(size)), size)
        position = torch.arange(len(job)) - (start - first)[job]
        rows = torch.stack([job, position, example[job]])
        self.job, self.position, self.example = rows.to(device)
        self.slot = self.job * base.shape[1] + self.position
        each = torch.stack([example, base.reads[example], start + base.reads[example] - first])
        self.of_job, self.reads, self.read_row = each.to(device)
        self.begun = torch.searchsorted(layer, torch.arange(layers), right=True).tolist()
        ends = [0, *size.cumsum(0).tolist()]
        self.live = [ends[n] for n in self.begun]
        self.start = start.to(device)
        same = bool((base.reads == base.shape[1] - 1).all())
        keys = torch.arange(base.shape[1], device=device)
        # of the last layer's one query of each job, where examples are padded
        self.seen = None if same else (keys <= self.reads[:, None])[:, None, None]
        self.first_layer = int(layer[0])

    def join(self, number: int, x: Tensor) -> Tensor:
        """The rows, and clean ones of the jobs that begin at a layer."""
        new = slice(len(x), self.live[number])
        if new.start == new.stop:
            return x
        clean = self.base.entries[number].unflatten(0, self.base.shape)
        clean = clean[self.example[new], self.position[new]]
        return torch.cat([x, clean])

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """z of all live rows (row, head, head_dim); of those that are read in the last layer."""
        jobs, live = self.begun[number], self.live[number]
        slot, base = self.slot[:live], self.base
        key, value = (
            clean[number][self.of_job[:jobs]].flatten(0, 1).index_copy_(0, slot, x)
            for clean, x in ((base.keys, k), (base.values, v))
        )
        key, value = (x.unflatten(0, (jobs, -1)) for x in (key, value))
        if number == len(base.entries) - 1:
            parts = (x.transpose(1, 2) for x in (q[:, None], key, value))
            return scaled_dot_product_attention(*parts, self.seen, enable_gqa=True)[:, :, 0]
        query = q.new_zeros(jobs * base.shape[1], *q.shape[1:]).index_copy_(0, slot, q)
        return _causal(query.unflatten(0, (jobs, -1)), key, value).flatten(0, 1)[slot]

    def through(self, number: int, x: Tensor, change_z: Any = None) -> Tensor:
        """Rows through a layer; of the last one only those that are read come out."""
        layer, base = self.base.model.model.layers[number], self.base
        last = number == len(base.entries) - 1
        q, k, v = base.project(layer, x, self.position[: len(x)])
        if last:
            x, q = x[self.read_row], q[self.read_row]
        z = self.attend(number, q, k, v)
        if change_z is not None:
            change_z(number, z, last)
        return base.finish(layer, x, z)


def _residuals_put(base: _Base, source: Tensor, jobs: Tensor, first: Tensor) -> Tensor:
    """(job, dim) the last rows after a residual was put at one position each."""
    rows = _Rows(base, jobs, first, source.device)
    put = source[tuple(jobs.to(source.device))].to(base.ends.dtype)
    x, joined = base.ends[:0], 0
    for number in range(rows.first_layer, len(base.entries)):
        x = rows.join(number, x)
        new = slice(joined, joined := rows.begun[number])
        x[rows.start[new]] = put[new]
        x = rows.through(number, x)
    return x


def _heads_put(base: _Base, source: Tensor, jobs: Tensor, first: Tensor) -> Tensor:
    """(job, dim) the last rows after z of one head was put at all positions."""
    rows = _Rows(base, jobs, first, source.device)
    draw, layer, example, head = jobs.to(source.device)
    put = source[draw, layer, example, :, head].to(base.ends.dtype)  # job, position, head_dim
    read = put[torch.arange(len(head), device=head.device), rows.reads]
    put, of_row = put[rows.job, rows.position], head[rows.job]
    every = torch.arange(len(rows.job), device=head.device)
    begun, ends = [0, *rows.begun], [0, *rows.live]

    def change(number: int, z: Tensor, last: bool) -> None:
        if last:
            new = slice(begun[number], begun[number + 1])
            z[every[new], head[new]] = read[new]
        else:
            new = slice(ends[number], ends[number + 1])
            z[every[new], of_row[new]] = put[new]

    x = base.ends[:0]
    for number in range(rows.first_layer, len(base.entries)):
        x = rows.through(number, rows.join(number, x), change)
    return x
