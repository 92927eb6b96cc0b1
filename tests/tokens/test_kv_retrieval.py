"""tokens.kv_retrieval: the full cache, plain Transformers on the keys that are read, loops."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import transformers as hf

from stratoscope.engine.generate import generate
from stratoscope.engine.trace import capture, trace
from stratoscope.errors import InputError, SiteError
from stratoscope.lab import planted
from stratoscope.models import LM, wrap
from stratoscope.tokens import _kv_blocks as kv
from stratoscope.tokens import kv_retrieval
from support import tiny
from support.cases import padded
from support.subjects import THREE, close, lm_of, untouched

EXAMPLE: dict[str, Any] = {
    "measure": {"budget": 4, "block": 1, "local": 1, "first": 1, "draws": 3},
    "edit": {"request": 1, "block": 1, "local": 1, "first": 0},
}
SMALL = {"block": 3, "local": 4, "first": 2}


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("name", THREE)
def test_the_full_budget_is_the_model_and_half_of_it_is_not(name: str) -> None:
    lm, both = lm_of(name), rows(29, 23)
    real = [slice(0, len(row)) for row in both]
    with untouched(lm):
        for side in ("left", "right"):
            given = padded(both, side)
            plain = lm(given)["logits"]
            with kv_retrieval.edit(lm, 29, **SMALL):
                whole = lm(given)["logits"]
            with kv_retrieval.edit(lm, 14, **SMALL):
                half = lm(given)["logits"]
            for example, where in enumerate(real):
                close(whole[example, where], plain[example, where], 1e-5)
                assert float((half[example, where] - plain[example, where]).abs().max()) > 1e-3


def one_layer() -> LM:
    torch.manual_seed(0)
    sizes = tiny.GROUPED | {"num_hidden_layers": 1, "initializer_range": 0.4}
    return wrap(hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval())


def test_it_is_plain_transformers_on_the_keys_that_are_read_at_their_own_positions() -> None:
    """One layer, so that a key is the same whatever stands beside it. Numbered anew, as keys are
    that are rotated after they were retrieved, the same keys say something else."""
    lm, [row] = one_layer(), rows(31)
    for probe in kv.PROBES:
        with kv_retrieval.edit(lm, 14, probe=probe, **SMALL):
            found = lm([row])["logits"][0, -1]
            seen = capture(lm, [row], "layers.0.attn.pattern", positions=-1)
        at = (seen["layers.0.attn.pattern"][0].sum(dim=0) > 0).nonzero()[:, 0]
        assert 8 <= len(at) <= 14 + 4
        assert {0, 1, 24, 25, 26, 27, 28, 29, 30} <= {*at.tolist()}
        ids = torch.tensor([row])[:, at]
        with torch.no_grad():
            own = lm.model(ids, position_ids=at[None]).logits[0, -1]
            anew = lm.model(ids).logits[0, -1]
        close(found, own, 1e-5)
        assert float((anew - own).abs().max()) > 1e-2


def by_loops(q: torch.Tensor, k: torch.Tensor, probe: str, room: int) -> torch.Tensor:
    """Which keys each query of one prompt reads: q, k (position, head, head_dim)."""
    n, block, local, first = len(q), *(SMALL[name] for name in ("block", "local", "first"))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    q, k = q.flatten(1).double(), k.flatten(1).double()
    seen = torch.zeros(n, n, dtype=torch.bool)
    for start in range(0, n, local):
        window = range(start, min(n, start + local))
        rows = q[window.start : window.stop]
        phi = (rows - rows.mean(0)).square() / rows.var(0, correction=0)
        phi = phi.sum(1) if len(rows) > 1 else torch.zeros(1)
        asked = {
            "activation": phi.softmax(0) @ rows if len(rows) > 1 else rows[0],
            "mean": rows.mean(0),
            "last": rows[-1],
        }.get(probe)
        edge, cut = start - local, {}
        for begin in range(first, max(first, edge), block):
            keys = range(begin, min(begin + block, edge))
            mean = k[list(keys)].mean(0)
            cut[keys] = float(asked @ mean) if asked is not None else float((rows @ mean).max())
        left, old = room, set(range(first))
        for keys in sorted(cut, key=lambda keys: -cut[keys]):
            if (left := left - len(keys)) < 0:
                break
            old |= {*keys}
        for query, key in product(window, range(n)):
            seen[query, key] = key <= query and (key in old or key >= edge)
    return seen


@pytest.mark.parametrize(
    ("name", "probe"), [*product(["llama"], kv.PROBES), ("gpt2", "activation")]
)
def test_what_is_read_by_loops(name: str, probe: str) -> None:
    lm, both = lm_of(name), rows(30, 21, seed=1)
    with kv_retrieval.edit(lm, 13, probe=probe, **SMALL):
        sites = [f"layers.1.attn.{point}" for point in ("q", "k", "pattern")]
        q, k, pattern = (capture(lm, both, *sites)[site] for site in sites)
    for example, row in enumerate(both):
        n = len(row)
        expected = by_loops(q[example, :n], k[example, :n], probe, room=13 - 2 - 4)
        assert torch.equal((pattern[example, :, :n, :n] > 0).all(dim=0), expected)
        assert torch.equal((pattern[example, :, :n, :n] > 0).any(dim=0), expected)


def test_a_query_at_the_mean_has_no_bias_and_the_least_weight() -> None:
    q = torch.tensor([[[2.0, 1.0], [-2.0, -1.0], [0.0, 0.0], [9.0, 9.0]]])
    inside = torch.tensor([[True, True, True, False]])
    phi = kv.activation_bias(q, inside)
    close(phi[0, :3], [3.0, 3.0, 0.0], 1e-6)
    assert phi[0, 3] == -torch.inf
    assert phi.softmax(dim=1)[0].tolist()[3] == 0
    assert kv.activation_bias(q[:, 2:3], inside[:, :1]).tolist() == [[0.0]]


def test_alike_keys_score_alike_and_blocks_are_read_whole() -> None:
    k, place = torch.ones(1, 12, 2, 3), torch.arange(12)[None]
    held = kv.blocks(k, place, torch.tensor([10]), first=2, block=3, groups=2)
    assert held.size.tolist() == [[3, 3, 2, 0]]
    q, inside = torch.randn(1, 5, 12), torch.ones(1, 5, dtype=torch.bool)
    for probe in kv.PROBES:
        score = kv.scores(q, inside, held, probe)[0]
        close(score[:3], score[:1].expand(3), 1e-5)
        assert score[3] == -torch.inf
    score = torch.tensor([[0.0, 2.0, 1.0, -torch.inf]])

    def read(room: int) -> list[int]:
        return kv.read(score, held, torch.tensor([room]))[0].nonzero()[:, 0].tolist()

    assert read(4) == [5, 6, 7]
    assert read(5) == [5, 6, 7, 8, 9]
    assert read(8) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert read(2) == []


def test_rooms_by_entropy_sum_to_the_total() -> None:
    entropies = torch.tensor([[1.0, 0.0, 3.0], [2.0, 0.0, 0.1], [0.5, 0.0, 0.4]])
    rooms = kv.by_entropy(entropies, 100)
    assert rooms.sum(dim=0).tolist() == [100, 100, 100]
    assert rooms[:, 0].tolist() == [29, 57, 14]
    assert sorted(rooms[:, 1].tolist()) == [33, 33, 34]
    assert kv.entropy(torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf] * 3])).tolist() == (
        pytest.approx([0.6931472, 0.0])
    )


@pytest.mark.parametrize("layered", [True, False])
def test_generating_with_a_batch_is_generating_alone_in_the_rooms_there_are(layered: bool) -> None:
    lm, both = lm_of("llama"), rows(33, 26, seed=2)
    with kv_retrieval.edit(lm, 18, layered=layered, **SMALL) as change:
        with trace(lm, "layers.*.attn.pattern", stop=False) as seen:
            together = generate(lm, both, tokens=5, eos_token_id=95)
        shares = torch.stack([change._entropy[layer] for layer in range(lm.dims.layers)])
        alone = [generate(lm, [row], tokens=5, eos_token_id=95)[0] for row in both]
    assert [row.tolist() for row in together] == [row.tolist() for row in alone]
    rooms = kv.by_entropy(shares, 3 * 12) if layered else torch.full((3, 2), 12)
    assert bool((rooms.sum(dim=0) == 36).all())
    for layer, example in product(range(3), range(2)):
        n = len(both[example])
        row = seen.steps(f"layers.{layer}.attn.pattern")[1][example, 0, 0, : n + 1]
        old = int((row[2 : n - 4] > 0).sum())
        [sizes] = [[3] * ((n - 6) // 3) + [(n - 6) % 3]]
        room = int(rooms[layer, example])
        assert old <= room
        assert old + 3 > min(room, sum(sizes))


def test_a_measure_is_what_the_edit_reads_and_attended_is_the_most() -> None:
    lm, both = lm_of("llama"), rows(27, 15, seed=3)  # blocks alike in size
    given = {"budget": 13, "needle": [(5, 8), (3, 7)], **SMALL}
    with untouched(lm):
        found = kv_retrieval.measure(lm, both, **given)
    even = found.attention.drop_sel(probe="layered")
    assert (even.sel(probe="attended") >= even.max("probe") - 1e-6).all()
    assert (found.room.sum("layer") == 3 * 7).all()
    with kv_retrieval.edit(lm, 13, **SMALL):
        pattern = capture(lm, both, "layers.0.attn.pattern", positions=-1)["layers.0.attn.pattern"]
    plain = capture(lm, both, "layers.0.attn.pattern")["layers.0.attn.pattern"]
    for example, (row, span) in enumerate(zip(both, given["needle"])):
        edge = (len(row) - 1) // 4 * 4 - 4
        old = range(2, edge)
        read = [key for key in old if pattern[example, :, key].sum() > 0]
        assert found.read.values[example, 0, : len(row)].nonzero()[0].tolist() == read
        last = plain[example, :, edge + 4 : len(row)].sum(dim=(0, 1))
        own = found.sel(probe="activation").isel(example=example, layer=0)
        assert float(own.attention) == pytest.approx(
            float(last[read].sum() / last[2:edge].sum()), abs=1e-5
        )
        assert float(own.recall) == pytest.approx(
            len({*read} & {*range(*span)}) / len(range(*span)), abs=1e-6
        )
    recent = found.sel(probe="recent").isel(example=0, layer=0)
    assert float(recent.recall) == 0  # 14 to 19 are the nearest; the needle is at 5 to 7
    assert (
        0 < float(found.null_attention.mean()) < float(found.attention.sel(probe="attended").mean())
    )


def test_the_token_after_the_last_like_it_is_found_in_a_planted_circuit() -> None:
    """An induction head looks for it; a probe at the mean of a longer window does not know whom to
    ask for."""
    p = planted.induction()
    lm = wrap(p.model, p.tokenizer)
    ids = lm.batch(p.clean).text[0][0].tolist()
    answer = lm.tokenizer.convert_tokens_to_ids(p.answer.strip())
    at = ids.index(answer)
    found = kv_retrieval.measure(
        lm, [p.clean], budget=2, block=1, local=1, first=0, needle=[(at, at + 1)]
    )
    [(layer, _)] = [head for head in p.heads if head[0] == max(head[0] for head in p.heads)]
    own = found.recall.isel(example=0, layer=layer)
    assert float(own.sel(probe="activation")) == float(own.sel(probe="attended")) == 1
    assert float(found.null_recall.isel(example=0, layer=layer).mean()) < 0.6


def test_what_is_refused() -> None:
    lm = lm_of("llama")
    for request, options, words in (
        (71, {}, "no room for the first 8"),
        (80, {"probe": "best"}, "choose one of activation"),
        (80, {"block": 0}, "1, 1 and 0 at least"),
    ):
        with pytest.raises(InputError, match=words):
            kv_retrieval.edit(lm, request, **options)
    with pytest.raises(SiteError, match="does not go on from a text"):
        kv_retrieval.edit(lm_of("bert"), 80)
    with pytest.raises(InputError, match=r"needle \(3, 40\)"):
        kv_retrieval.measure(lm, rows(9), budget=80, needle=[(3, 40)])
    with pytest.raises(InputError, match="2 needles for 1 texts"):
        kv_retrieval.measure(lm, rows(9), budget=80, needle=[(3, 4)] * 2)
