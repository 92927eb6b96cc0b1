"""Generation with the cache, watched and changed, equals recomputing the whole sequence at every
step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stratoscope.engine.generate import generate
from stratoscope.engine.intervene import Intervention, add, intervene, knock_out, replaced, scaled
from stratoscope.engine.trace import capture, trace
from stratoscope.errors import FamilyError, InputError
from stratoscope.models.taps import Taps
from support import tiny

PROMPTS = tiny.inputs("llama")
VALUE = torch.linspace(-1, 1, 32)
DECODERS = [n for n in tiny.DECODERS if n != "gpt_neox_sequential"]
ENDLESS: dict[str, Any] = {"eos_token_id": None}


def recomputed(name: str, prompt: list[int], tokens: int, changes: Any) -> list[int]:
    """Greedy ids without a cache, one example alone; `changes(step, length)` are made anew over the
    whole sequence."""
    lm, ids = tiny.lm(name), list(prompt)
    for step in range(tokens):
        with torch.no_grad(), intervene(lm, *changes(step, len(ids))):
            ids.append(int(lm([ids])["logits"][0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_ids_are_hugging_face_s(name: str) -> None:
    got = generate(tiny.lm(name), PROMPTS, tokens=6, **ENDLESS)
    for prompt, new in zip(PROMPTS, got):
        plain = tiny.model(name).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)).long(),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )[0, len(prompt) :]
        assert new.tolist() == plain.tolist()
        assert len(new) == 6


@pytest.mark.parametrize("name", tiny.VLMS)
def test_generation_about_an_image(name: str) -> None:
    lm, given = tiny.lm(name), tiny.inputs(name)
    plain = tiny.model(name).generate(
        **given,
        attention_mask=torch.ones_like(given["input_ids"]),
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
    )[0, given["input_ids"].shape[1] :]
    [new] = generate(lm, given, tokens=5)
    assert new.tolist() == [i for i in plain.tolist() if i != 2][: len(new)]
    assert len(new) > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mistral"])
def test_interventions_with_the_cache_equal_those_without(name: str) -> None:
    """Left padding inside generation shifts every example; named positions still mean its own
    tokens."""
    cases: list[list[Intervention]] = [
        [add("layers.1.resid_post", 4 * VALUE)],
        [scaled("layers.*.mlp.out", -1.0), add("layers.0.attn.z", 2.0, units=[1])],
        [replaced("layers.1.resid_pre", 5 * VALUE, positions=-1)],
        [
            replaced("layers.0.resid_post", 5 * VALUE, positions=1),
            scaled("layers.2.attn.pattern", 0.3, units=[2]),
        ],
        [knock_out("*", None, 1)],
        [knock_out(1, 4, [0, 2])],
        [add("layers.1.resid_post", 9 * VALUE, positions=-2, examples=[1])],
        # keys and values are read again at every step
        [add("layers.*.attn.v", 6.0, positions=-2, units=[0])],
        [
            scaled("layers.*.attn.k", -4.0, positions=1),
            add("layers.0.attn.v", -5.0, positions=0, examples=[0]),
        ],
    ]
    changed = 0
    for case in cases:
        with intervene(tiny.lm(name), *case):
            got = generate(tiny.lm(name), PROMPTS, tokens=5, **ENDLESS)
        for example, prompt in enumerate(PROMPTS):
            own = [c for c in case if c.examples is None or example in c.examples]
            expected = recomputed(
                name,
                prompt,
                5,
                lambda step, length, own=own: [alone(c, length - step) for c in own],
            )
            assert got[example].tolist() == expected, (case, example)
        plain = generate(tiny.lm(name), PROMPTS, tokens=5, **ENDLESS)
        changed += any(a.tolist() != b.tolist() for a, b in zip(got, plain))
    assert changed >= 5


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_changed_keys_and_values_last(name: str, kind: str) -> None:
    """The logits of every step, not the chosen ids alone, equal those of a run without a cache."""
    lm, options = tiny.lm(name), {} if kind == "dynamic" else {"cache_implementation": kind}
    changes = [
        add("layers.1.attn.v", 3.0, positions=-2),
        scaled("layers.0.attn.k", -2.0, positions=2),
    ]
    with intervene(lm, *changes), trace(lm, "logits", positions=-1, stop=False) as seen:
        new = generate(lm, PROMPTS, tokens=6, **ENDLESS, **options)
    for example, prompt in enumerate(PROMPTS):
        ids = prompt + new[example].tolist()
        own = [alone(change, len(prompt)) for change in changes]
        with torch.no_grad(), intervene(lm, *own):
            whole = lm([ids])["logits"][0]
        for step, logits in enumerate(seen.steps("logits")):
            assert tiny.gap(logits[example], whole[len(prompt) - 1 + step]) < 1e-4, (example, step)


KEYED = ("layers.0.attn.pattern", "layers.1.attn.scores", "layers.0.attn.k", "layers.1.attn.v")


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
def test_keys_are_the_examples_own_at_every_step(name: str, kind: str) -> None:
    """Of unequal prompts, and after a sliding window has moved on: as in one run over the whole
    sequence."""
    lm, options = tiny.lm(name), {} if kind == "dynamic" else {"cache_implementation": kind}
    with trace(lm, *KEYED, stop=False) as seen:
        new = generate(lm, PROMPTS, tokens=5, **ENDLESS, **options)
    gone = 0
    for example, prompt in enumerate(PROMPTS):
        ids = prompt + new[example].tolist()
        whole = capture(lm, [ids], *KEYED)
        for step in range(5):
            have = len(prompt) + step
            for site in KEYED[:2]:
                got, want = seen.steps(site)[step][example], whole[site][0]
                want = (
                    want[:, : len(prompt), : len(prompt)]
                    if not step
                    else want[:, have - 1 : have, :have]
                )
                got = got[:, : want.shape[1], :have]
                assert torch.equal(got.isinf(), want.isinf()), (site, step)
                assert (
                    tiny.gap(got.masked_fill(got.isinf(), 0), want.masked_fill(want.isinf(), 0))
                    < 1e-4
                )
            for site in KEYED[2:]:
                got, want = seen.steps(site)[step][example, :have], whole[site][0, :have]
                there = ~got.isnan()
                gone += int(have - there[:, 0, 0].sum())
                assert there[-1].all()
                assert tiny.gap(got[there], want[there]) < 1e-4, (site, step)
    assert bool(gone) == (name in ("mistral", "gemma2"))  # a window of 4


def test_the_newest_key_of_every_step() -> None:
    lm, sites = tiny.lm("llama"), ("layers.1.attn.k", "layers.1.attn.pattern")
    with trace(lm, *sites, positions=-1, stop=False) as seen:
        new = generate(lm, PROMPTS, tokens=3, **ENDLESS)
    for example, prompt in enumerate(PROMPTS):
        whole = capture(lm, [prompt + new[example].tolist()], *sites)
        for step in range(3):
            at = len(prompt) + step - 1
            assert tiny.gap(seen.steps(sites[0])[step][example], whole[sites[0]][0, at]) < 1e-4
            want = whole[sites[1]][0, :, at, : at + 1]
            assert tiny.gap(seen.steps(sites[1])[step][example][:, : at + 1], want) < 1e-4


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize(
    "change",
    [
        add("layers.1.resid_post", 9 * VALUE, examples=[1]),
        add("layers.1.resid_post", 9 * VALUE, positions=[1, -1]),
        add("layers.0.attn.v", 6.0, positions=-2, examples=[0]),
        add(
            "layers.1.resid_post",
            torch.stack([9 * VALUE, -9 * VALUE])[:, None],
            positions=[[2], [-1]],
        ),
        knock_out("*", None, 1),
    ],
)
def test_beams_are_rows_of_their_prompt(change: Intervention, options: dict[str, int]) -> None:
    """Several prompts with beams give what each gives alone."""
    from dataclasses import replace

    lm, each = tiny.lm("llama"), options.get("num_return_sequences", 1)
    with intervene(lm, change):
        got = generate(lm, PROMPTS, tokens=4, **ENDLESS, **options)
    plain = generate(lm, PROMPTS, tokens=4, **ENDLESS, **options)
    assert len(got) == 2 * each
    for example, prompt in enumerate(PROMPTS):
        own = [change] if change.examples is None or example in change.examples else []
        own = [replace(c, examples=None) for c in own]
        if change.value.ndim > 1:
            at = change.positions[example]
            own = [replace(c, value=c.value[example : example + 1], positions=at) for c in own]
        with intervene(lm, *own):
            want = generate(lm, [prompt], tokens=4, **ENDLESS, **options)
        assert [x.tolist() for x in got[each * example :][:each]] == [x.tolist() for x in want]
    assert any(a.tolist() != b.tolist() for a, b in zip(got, plain))


def test_a_trace_of_beams_holds_every_row() -> None:
    lm, site = tiny.lm("llama"), "layers.1.resid_post"
    with trace(lm, site, positions=1, stop=False) as seen:
        generate(lm, PROMPTS, tokens=2, num_beams=2, **ENDLESS)
    one = capture(lm, PROMPTS, site, positions=1)[site]
    assert tiny.gap(seen[site], one.repeat_interleave(2, dim=0)) < 1e-4


def test_nothing_is_compiled_while_generating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers compiles a step with a static cache on accelerators; here it is told that this
    is one."""
    from transformers.generation.configuration_utils import CompileConfig

    compiler = CompileConfig(backend="eager", mode=None, fullgraph=False)
    compiler._compile_all_devices = True
    lm = tiny.lm("llama")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    generate(
        lm, PROMPTS[:1], tokens=3, cache_implementation="static", compile_config=compiler, **ENDLESS
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_new_tokens": 3}, "tokens="),
        ({"max_length": 30}, "tokens="),
        ({"return_dict_in_generate": True}, "new ids are returned"),
        ({"prefill_chunk_size": 4}, "one forward pass"),
        ({"tokens": 0}, "at least one"),
    ],
)
def test_options_that_would_be_lost_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        generate(tiny.lm("llama"), PROMPTS, **options)


def alone(change: Intervention, length: int) -> Intervention:
    """The same change for one example of the batch alone, whose prompt has `length` tokens."""
    from dataclasses import replace

    positions = change.positions
    if isinstance(positions, int) and positions < 0:
        positions += length
    return replace(change, positions=positions, examples=None)


def test_steps_are_forward_passes() -> None:
    """A change at step 2 acts on the third new token and on what later steps read of it in the
    cache."""
    lm, prompt = tiny.lm("llama"), PROMPTS[0]
    site = "layers.1.resid_post"
    with intervene(lm, add(site, 9 * VALUE, steps=[2])):
        [got] = generate(lm, [prompt], tokens=5, **ENDLESS)

    def changes(step: int, length: int) -> list[Intervention]:
        return [] if step < 2 else [add(site, 9 * VALUE, positions=len(prompt) + 1)]

    assert got.tolist() == recomputed("llama", prompt, 5, changes)
    [plain] = generate(lm, [prompt], tokens=5, **ENDLESS)
    assert got[:2].tolist() == plain[:2].tolist()
    assert got.tolist() != plain.tolist()
    with intervene(lm, add(site, 9 * VALUE, steps=[0])):
        [at_prompt] = generate(lm, [prompt], tokens=1, **ENDLESS)
    whole = recomputed("llama", prompt, 1, lambda step, length: [add(site, 9 * VALUE)])
    assert at_prompt.tolist() == whole


def test_a_trace_during_generation() -> None:
    lm, site = tiny.lm("llama"), "layers.2.resid_post"
    with trace(lm, site, "layers.1.attn.pattern", stop=False) as seen:
        new = generate(lm, PROMPTS, tokens=4, **ENDLESS)
    steps = seen.steps(site)
    assert [x.shape[1] for x in steps] == [9, 1, 1, 1]
    assert [x.shape[-1] for x in seen.steps("layers.1.attn.pattern")] == [9, 10, 11, 12]
    for example, prompt in enumerate(PROMPTS):
        whole = capture(lm, [prompt + new[example].tolist()], site)[site][0]
        # unshifted: token 0 comes first
        assert tiny.gap(steps[0][example, : len(prompt)], whole[: len(prompt)]) < 1e-4
        for step in (1, 2, 3):
            assert tiny.gap(steps[step][example, 0], whole[len(prompt) + step - 1]) < 1e-4


@pytest.mark.parametrize("positions", [-1, 1, [0, -1]])
def test_traced_positions_during_generation(positions: Any) -> None:
    """-1 is the newest token of every step; any other named position came with the prompt."""
    lm, site = tiny.lm("llama"), "layers.2.resid_post"
    with trace(lm, site, positions=positions, stop=False) as seen:
        new = generate(lm, PROMPTS, tokens=3, **ENDLESS)
    steps = seen.steps(site)
    at_prompt = capture(lm, PROMPTS, site, positions=positions)[site]
    assert tiny.gap(steps[0], at_prompt) < 1e-4
    assert len(steps) == (3 if positions == -1 else 1)
    if positions == -1:
        for example, prompt in enumerate(PROMPTS):
            whole = capture(lm, [prompt + new[example].tolist()], site)[site][0]
            for step in (1, 2):
                assert steps[step].shape == (2, 32)
                assert tiny.gap(steps[step][example], whole[len(prompt) + step - 1]) < 1e-4


def test_a_second_generation_starts_at_step_0() -> None:
    lm = tiny.lm("llama")
    with intervene(lm, add("layers.1.resid_post", 9 * VALUE, positions=-1)):
        one, two = (generate(lm, PROMPTS, tokens=3, **ENDLESS) for _ in range(2))
        direct = lm.model.generate(
            torch.tensor(PROMPTS[:1]), max_new_tokens=3, do_sample=False, **ENDLESS, pad_token_id=0
        )
    assert [x.tolist() for x in one] == [x.tolist() for x in two]
    assert direct[0, 9:].tolist() == one[0].tolist()


def test_an_end_token_ends_the_row() -> None:
    lm = tiny.lm("llama")
    [free] = generate(lm, PROMPTS[:1], tokens=5, **ENDLESS)
    end = int(free[2])
    got = generate(lm, PROMPTS, tokens=5, eos_token_id=end)
    assert got[0].tolist() == free[: free.tolist().index(end)].tolist()
    assert all(end not in row.tolist() for row in got)


def test_what_cannot_generate_is_refused() -> None:
    with pytest.raises(InputError, match="cannot generate"):
        generate(tiny.lm("bert"), PROMPTS)
    with (
        pytest.raises(InputError, match="stop=False"),
        trace(tiny.lm("llama"), "layers.0.resid_post"),
    ):
        generate(tiny.lm("llama"), PROMPTS)
    with pytest.raises(InputError, match="use_cache"):
        generate(tiny.lm("llama"), PROMPTS, use_cache=False)


def test_generation_draws_nothing() -> None:
    before: Tensor = torch.get_rng_state()
    generate(tiny.lm("llama"), PROMPTS, tokens=2)
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_that_is_set_to_go_without_a_cache_has_one_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = tiny.lm("llama")
    monkeypatch.setattr(lm.model.generation_config, "use_cache", False)
    with trace(lm, "layers.0.resid_post", stop=False) as seen:
        generate(lm, PROMPTS[:1], tokens=3, **ENDLESS)
    assert [x.shape[1] for x in seen.steps("layers.0.resid_post")] == [len(PROMPTS[0]), 1, 1]


def test_a_cache_that_is_not_seen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers 5.24 renamed it: every pass then looked like the first, and position -1 was
    counted in the prompt."""
    monkeypatch.setattr(Taps, "_count", lambda *_: None)
    with (
        trace(tiny.lm("llama"), "logits", stop=False),
        pytest.raises(FamilyError, match="without a cache"),
    ):
        generate(tiny.lm("llama"), PROMPTS[:1], tokens=3, **ENDLESS)


def test_a_mean_over_beams_is_over_each_prompt_s_own_tokens() -> None:
    lm, site = tiny.lm("llama"), "layers.1.mlp.out"
    with trace(lm, site, stop=False) as seen:
        generate(lm, PROMPTS, tokens=1, num_beams=2, **ENDLESS)
    with trace(lm, site) as once:
        lm(PROMPTS)
    assert tiny.gap(seen.mean(site), once.mean(site)) < 1e-5


def test_an_example_is_all_its_sampled_sequences() -> None:
    """Two of each prompt without beams: a change of the second reaches its rows, and no other."""
    lm, site = tiny.lm("llama"), "layers.1.mlp.out"
    with (
        intervene(lm, replaced(site, 7.0, positions=-1, examples=[1])),
        trace(lm, site, positions=-1, stop=False) as seen,
    ):
        generate(lm, PROMPTS, tokens=1, do_sample=True, num_return_sequences=2, **ENDLESS)
    assert (seen[site] == 7).all(dim=1).tolist() == [False, False, True, True]
