"""Low-rank attention: projections by hand, the score they leave, and a planted head that needs few
directions."""

from __future__ import annotations

import pytest
import torch

from stratoscope.editing import low_rank_attention
from stratoscope.engine.edit import Edit
from stratoscope.engine.metric import last_logits
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.models import wrap
from support import zoo
from support.subjects import ROWS, close, lm_of, padded, untouched

EXAMPLE = {"edit": lambda case: {"request": [(0, 1), (1, 2)], "prompts": case.rows}}


def test_complement_by_hand() -> None:
    rows = torch.tensor([[3.0, 0, 0, 0], [3, 0, 0, 0], [0, 0, 2, 0], [0, 0.1, 0, 0]])
    left = low_rank_attention.complement(rows, 2)
    close(left @ left.T, torch.eye(2))
    close(left.T @ left, torch.diag(torch.tensor([0.0, 1, 0, 1])))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_score_is_that_of_both_projections_and_other_heads_keep_theirs(name: str) -> None:
    lm, rank = lm_of(name), 3
    prompts = [[3, 14, 15, 92, 65], [9, 26, 5, 35, 89], [46, 26, 43, 38, 3]]
    edit = low_rank_attention.edit(
        lm, [(1, 2)], prompts=prompts, keys=[1, 3], queries=-1, rank=rank
    )
    sites = "layers.1.attn.q", "layers.1.attn.k", "layers.1.attn.scores"
    seen = capture(lm, prompts, *sites)
    with untouched(lm), edit:
        after = capture(lm, prompts, *sites)
    group = lm.dims.heads // lm.dims.kv_heads
    q, k = seen[sites[0]][:, -1, 2], seen[sites[1]][:, :, 2 // group]
    bases = [torch.linalg.svd(x.reshape(-1, 8)).Vh[:rank] for x in (q, k[:, [1, 3]])]
    p_q, p_k = (basis.T @ basis for basis in bases)
    close(after[sites[2]][:, 2, -1], torch.einsum("eh,ekh->ek", q @ p_q, k @ p_k) / 8**0.5)
    for head in (0, 1, 3):
        assert torch.equal(after[sites[2]][:, head], seen[sites[2]][:, head])
    assert torch.equal(after[sites[2]][:, 2, :-1], seen[sites[2]][:, 2, :-1])  # other queries


def test_the_planted_head_needs_one_direction() -> None:
    """Its query is ASK and its key FLAG: one direction of each; a random one loses the answer."""
    p = planted.copy_head()
    lm = wrap(p.model, p.tokenizer)
    variants = p.variants(12, seed=1)
    prompts, asked = [v.clean for v in variants[:6]], [v.clean for v in variants[6:]]
    answers = [p.tokenizer.convert_tokens_to_ids(v.answer) for v in variants[6:]]
    said = lambda: last_logits(lm, asked).argmax(dim=-1).tolist()  # noqa: E731
    with low_rank_attention.edit(lm, [(1, 3)], prompts=prompts, rank=1):
        assert said() == answers
    with low_rank_attention.edit(lm, [(1, 3)], prompts=prompts, rank=1, null=0):
        assert said() != answers


def test_an_edit_can_be_kept(tmp_path) -> None:
    lm = lm_of("llama")
    inputs = padded(ROWS, "left")
    with (
        torch.no_grad(),
        low_rank_attention.edit(lm, [(0, 1), (2, 3)], prompts=ROWS, rank=2) as made,
    ):
        inside = lm(inputs)["logits"].clone()
        made.save(tmp_path / "edit.safetensors")
    assert not torch.allclose(lm(inputs)["logits"], inside)
    with torch.no_grad(), Edit.load(lm, tmp_path / "edit.safetensors"):
        assert torch.equal(lm(inputs)["logits"], inside)


@pytest.mark.parametrize("queries", [None, -1, [0, -1]])
def test_padding_says_nothing_of_a_head(queries) -> None:
    """Prompts of unequal length name the directions that each alone would add, whatever stands at
    padding."""
    from dataclasses import replace

    lm = lm_of("llama")
    batch = lm.batch([[3, 14, 15, 92, 65, 35, 89], [38, 46, 26]])
    values = []
    for pad in (0, 7):
        padded_ids = torch.where(batch.mask, batch.ids, pad)
        made = low_rank_attention.edit(
            lm, [(1, 1)], prompts=replace(batch, ids=padded_ids), queries=queries, rank=2
        )
        values.append(torch.stack([change.value.T @ change.value for change in made.interventions]))
    close(values[0], values[1])


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_bigcode"])
def test_queries_wider_than_values_and_one_key_head_for_all(name: str) -> None:
    """Multi-head latent attention: q and k 12 wide, values 8. Multi-query attention: one key head
    of four queries."""
    lm, prompts = zoo.lm(name), [[3, 14, 15, 92, 65], [9, 26, 5, 35, 89]]
    sites = "layers.1.attn.q", "layers.1.attn.k", "layers.1.attn.scores"
    seen = capture(lm, prompts, *sites)
    q, k = seen[sites[0]][:, -1, 3], seen[sites[1]][:, :, -1]  # the last head's, or the only one
    edit = low_rank_attention.edit(lm, [(1, 3)], prompts=prompts, rank=2)
    with untouched(lm), edit:
        after = capture(lm, prompts, sites[2])[sites[2]]
    p_q, p_k = (
        basis.T @ basis
        for basis in (torch.linalg.svd(x.reshape(-1, q.shape[-1])).Vh[:2] for x in (q, k))
    )
    before = torch.einsum("eh,ekh->ek", q, k)
    scale = (seen[sites[2]][:, 3, -1] / before).median()
    close(after[:, 3, -1], scale * torch.einsum("eh,ekh->ek", q @ p_q, k @ p_k), 1e-3)
    with pytest.raises(InputError, match=f"choose 1 to {q.shape[-1] - 1}"):
        low_rank_attention.edit(lm, [(1, 3)], prompts=prompts, rank=q.shape[-1])


def test_refusals() -> None:
    lm = lm_of("llama")
    for request, options, said in (
        ([(1, 4)], {"prompts": ROWS}, "3 x 4"),
        ([(1, 4)], {"prompts": ROWS, "rank": 8}, "3 x 4"),
        ([], {"prompts": ROWS}, "at least one"),
        ([(1, 2)], {"prompts": ROWS, "rank": 8}, "choose 1 to 7"),
        ([(1, 2)], {}, "give `prompts=`"),
    ):
        with pytest.raises(InputError, match=said):
            low_rank_attention.edit(lm, request, **options)
