"""LongRoPE: every example of a batch is what plain transformers makes of it alone, whatever the
lengths beside it; where a text grows over the length at which the angles change, a refusal."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from stratoscope.engine.generate import generate
from stratoscope.engine.gradients import gradients
from stratoscope.engine.intervene import add, intervene, replaced
from stratoscope.engine.metric import Whole, last_logits, target
from stratoscope.engine.sequence import swept
from stratoscope.engine.sequence import target as whole_target
from stratoscope.engine.sweep import naive, plan, sweep
from stratoscope.engine.trace import capture, trace
from stratoscope.errors import FamilyError, InputError
from stratoscope.heads import activation_patching
from stratoscope.models import LM, wrap
from stratoscope.tokens import next_token, occlusion
from support import tiny

SHORT, EDGE, LONG = [3, 14, 15, 9, 26], [7, 8, 9, 10, 11, 12], [5, 8, 9, 7, 9, 3, 2, 38]
ROWS = [SHORT, LONG, EDGE]  # the angles change above six tokens
ROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 6,
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
}
SIZES = tiny.GROUPED | {"max_position_embeddings": 32}
PLAIN_GEMMA = {"rope_type": "default", "rope_theta": 1e4}
MODELS: dict[str, Callable[[], Any]] = {
    "phi3": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(**SIZES, original_max_position_embeddings=6, rope_parameters=ROPE.copy())
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, rope_parameters=ROPE.copy())),
    "phimoe": lambda: hf.PhimoeForCausalLM(
        hf.PhimoeConfig(
            **SIZES,
            num_local_experts=4,
            rope_parameters=ROPE | {"short_mscale": 1.1, "long_mscale": 1.4},
        )
    ),
    # angles by the kind of layer, of which one is LongRoPE
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **SIZES,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            rope_parameters={"sliding_attention": PLAIN_GEMMA, "full_attention": ROPE.copy()},
        )
    ),
}


@cache
def subject(name: str) -> LM:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.15 * torch.randn_like(value))
    return wrap(model)


@torch.no_grad()
def alone(lm: LM, row: list[int]) -> Any:
    return lm.model(input_ids=torch.tensor([row]), output_hidden_states=True)


def difference(logits: Tensor, example: Tensor | None = None) -> Tensor:
    return logits[:, 5] - logits[:, 7]


def padded(left: bool) -> dict[str, Tensor]:
    """All rows in one batch, as a user pads them."""
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for number, row in enumerate(ROWS):
        start = 8 - len(row) if left else 0
        ids[number, start : start + len(row)], mask[number, start : start + len(row)] = (
            torch.tensor(row),
            1,
        )
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("left", [False, True])
def test_every_example_is_what_it_is_alone(name: str, left: bool) -> None:
    lm = subject(name)
    with torch.no_grad():
        together = lm(padded(left))["logits"]
        unsplit = lm.model(**padded(False)).logits
    seen = capture(lm, padded(left), "layers.*.resid_pre", "layers.2.attn.pattern")
    for number, row in enumerate(ROWS):
        true, n = alone(lm, row), len(row)
        assert tiny.gap(together[number, :n], true.logits[0]) < 1e-5
        for layer in range(3):
            got = seen[f"layers.{layer}.resid_pre"][number, :n]
            assert tiny.gap(got, true.hidden_states[layer][0]) < 1e-5
        # the model's own call on the batch: right for the long one, another for the short ones
        neighbours = tiny.gap(unsplit[number, :n], true.logits[0])
        assert neighbours < 1e-5 if row == LONG else neighbours > 1e-3
    assert not lm.model.model.rotary_emb._forward_hooks
    assert tiny.gap(last_logits(lm, lm.batch(ROWS))[0], together[0, 4]) < 1e-5


def test_embeddings_are_counted_too() -> None:
    lm, given = subject("phi3"), padded(True)
    embeds = lm.model.get_input_embeddings()(given["input_ids"]).detach()
    with torch.no_grad():
        got = lm({"inputs_embeds": embeds, "attention_mask": given["attention_mask"]})["logits"]
    assert tiny.gap(got[0, : len(SHORT)], alone(lm, SHORT).logits[0]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["phi3", "llama"])
def test_sweeps_pack_rows_of_both_kinds(name: str) -> None:
    """Against plain hooks on plain runs, one by one; packed and naive."""
    lm = subject(name)
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    cells = [replaced("layers.1.mlp.out", v, positions=p) for p, v in enumerate(vectors)]
    assert plan(lm, ROWS, cells).naive == 0
    packed, slow = sweep(lm, ROWS, cells, difference), naive(lm, ROWS, cells, difference)
    mlp = lm.model.model.layers[1].mlp
    for number, row in enumerate(ROWS):
        for place, vector in enumerate(vectors):

            def put(_: Any, args: Any, out: Tensor, place: int = place, v: Tensor = vector) -> Any:
                out = out.clone()
                out[0, place] = v
                return out

            handle = mlp.register_forward_hook(put)
            true = difference(alone(lm, row).logits[:, -1])
            handle.remove()
            assert float((packed[place, number] - true).abs()) < 1e-5
            assert float((slow[place, number] - true).abs()) < 1e-5


@torch.no_grad()
def test_patching_pairs_of_both_kinds() -> None:
    lm = subject("phi3")
    other = [[*row[:1], 40, *row[2:]] for row in ROWS]
    words: dict[str, Any] = {"answer": 5, "foil": 7, "draws": 2}
    both = activation_patching.measure(lm, ROWS, corrupt=other, **words)
    for number, (row, corrupt) in enumerate(zip(ROWS, other)):
        one = activation_patching.measure(lm, [row], corrupt=[corrupt], **words)
        true = difference(alone(lm, row).logits[:, -1])
        assert float(both.clean_difference[number]) == pytest.approx(float(true), abs=1e-5)
        for what in ("effect", "null", "bound"):
            gap = abs(both[what].to_numpy()[number] - one[what].to_numpy()[0]).max()
            assert gap < 1e-4 * max(1, abs(one[what].to_numpy()).max())


def test_gradients() -> None:
    lm = subject("phi3")
    value, _, found = gradients(lm, ROWS, ["layers.0.resid_pre"], difference)
    grads = found.popitem()[1]
    for number, row in enumerate(ROWS):
        x = lm.model.get_input_embeddings()(torch.tensor([row])).detach().requires_grad_(True)
        with torch.enable_grad():
            true = difference(lm.model(inputs_embeds=x).logits[:, -1])
            (own,) = torch.autograd.grad(true.sum(), [x])
        assert float(value[number]) == pytest.approx(float(true.detach()), abs=1e-5)
        assert tiny.gap(grads[number, : len(row)], own[0]) < 1e-5


def test_next_token() -> None:
    lm = subject("phi3")
    found = next_token.measure(lm, ROWS, answer=5, foil=7)
    for number, row in enumerate(ROWS):
        true = float(difference(alone(lm, row).logits[:, -1]))
        assert float(found.logit_difference[number]) == pytest.approx(true, abs=1e-5)


def test_changes_reach_the_examples_they_name() -> None:
    lm, push = subject("phi3"), torch.linspace(-1, 1, 32)
    with torch.no_grad(), intervene(lm, add("layers.0.mlp.out", push, examples=[0])):
        got = lm(ROWS)["logits"]
    with torch.no_grad(), intervene(lm, add("layers.0.mlp.out", push)):
        own = lm([SHORT])["logits"][0]
    assert tiny.gap(got[0, : len(SHORT)], own) < 1e-5
    assert tiny.gap(got[1], alone(lm, LONG).logits[0]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generation_on_either_side(name: str, options: dict[str, Any]) -> None:
    """Two tokens more: the short text of five has six when its last new token is asked for."""
    lm = subject(name)
    got = generate(lm, [SHORT, LONG], tokens=2, eos_token_id=-1, **options)
    for row, new in zip([SHORT, LONG], got):
        true = lm.model.generate(
            torch.tensor([row]),
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            max_new_tokens=2,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
            **options,
        )
        assert new.tolist() == true[0, len(row) :].tolist()


@torch.no_grad()
def test_what_is_seen_at_each_step_of_generation() -> None:
    lm = subject("phi3")
    with trace(lm, "layers.2.resid_post", positions=-1, stop=False) as seen:
        ids = generate(lm, [SHORT, LONG], tokens=2, eos_token_id=-1)
    for number, row in enumerate([SHORT, LONG]):
        for step, state in enumerate(seen.steps("layers.2.resid_post")):
            text = [*row, *ids[number][:step].tolist()]
            true = lm.model.lm_head(lm.model.model.norm(state[number]))
            assert tiny.gap(true, alone(lm, text).logits[0, -1]) < 1e-5


@pytest.mark.parametrize("rows", [[SHORT], [SHORT, LONG], [EDGE]])
def test_generation_over_the_length_is_refused(rows: list[list[int]]) -> None:
    room = 6 - len(rows[0]) + 1
    with pytest.raises(InputError, match=rf"{len(rows[0])} tokens and 3 more.*most {room}"):
        generate(subject("phi3"), rows, tokens=3)


WHOLE: dict[str, Any] = {"answer": Whole((5, 60, 7)), "foil": Whole((9, 61))}


def whole(lm: LM, row: list[int], embeds: Callable[[Tensor], Tensor] = lambda x: x) -> float:
    """What `WHOLE` asks: each token given the text before it, by a plain run that ends there."""
    total = 0.0
    for sign, text in ((1, (5, 60, 7)), (-1, (9, 61))):
        for k, token in enumerate(text):
            x = embeds(lm.model.get_input_embeddings()(torch.tensor([[*row, *text[:k]]])))
            logits = lm.model(inputs_embeds=x).logits[0, -1]
            total += sign * float(logits.log_softmax(dim=-1)[token])
    return total


@torch.no_grad()
def test_whole_answers_that_make_a_text_long() -> None:
    """They are scored and their prompts' tokens left out; what another run made of a prompt is not
    put under them."""
    lm, rows = subject("phi3"), [SHORT, LONG]
    found = occlusion.measure(lm, rows, **WHOLE, replacement="zero")

    def without(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], torch.zeros_like(x[:, :1]), x[:, 2:]], dim=1)

    for number, row in enumerate(rows):
        true = whole(lm, row)
        assert float(found.logit_difference[number]) == pytest.approx(true, abs=1e-4)
        left = true - whole(lm, row, without)
        assert float(found.attribution[number, 1]) == pytest.approx(left, abs=1e-4)
    batch = lm.batch(rows)
    asked = whole_target(lm, batch, **WHOLE)
    z = capture(lm, batch, "layers.1.attn.z")["layers.1.attn.z"]
    with pytest.raises(InputError, match=r"longer than 6 tokens.*layers\.1\.attn\.z"):
        swept(lm, batch, [replaced("layers.1.attn.z", 2 * z)], asked)
    long = lm.batch([LONG])
    swept(lm, long, [replaced("layers.1.attn.z", 2 * z[1:])], whole_target(lm, long, **WHOLE))
    first = target(lm, batch, 5, 9)
    assert swept(lm, batch, [replaced("layers.1.attn.z", 2 * z)], first).shape == (1, 2)


def test_angles_that_nobody_makes_are_refused() -> None:
    torch.manual_seed(0)
    lm = wrap(MODELS["llama"]().eval())
    lm.model.model.rotary_emb.rope_type = "other"
    with pytest.raises(FamilyError, match=r"5 to 8 tokens in one batch.*above 6 apart"):
        lm(ROWS)
    with torch.no_grad():
        lm([SHORT, EDGE])
