"""Planted models: what is said to be true of them is true, by plain hooks on plain Hugging Face
models."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM

from stratoscope.errors import InputError
from stratoscope.lab import planted as room
from stratoscope.lab.planted import Planted, Variant

ALL = room.everything()
every = pytest.mark.parametrize("planted", ALL, ids=[one.name for one in ALL])


class Parts(NamedTuple):
    """Where plain Hugging Face keeps what these tests hook."""

    layers: nn.ModuleList
    attention: str
    before_attention: str
    before_mlp: str
    out: str
    down: str
    final: nn.Module
    head_dim: int


def parts(planted: Planted) -> Parts:
    model, size = planted.model, getattr(planted.model.config, "head_dim", 32)
    if isinstance(model, GPT2LMHeadModel):
        base = model.transformer
        return Parts(base.h, "attn", "ln_1", "ln_2", "c_proj", "c_proj", base.ln_f, size)
    base = model.model
    before_mlp = "post_attention_layernorm"
    return Parts(
        base.layers,
        "self_attn",
        "input_layernorm",
        before_mlp,
        "o_proj",
        "down_proj",
        base.norm,
        size,
    )


def ids(planted: Planted, prompts: list[str]) -> Tensor:
    return planted.tokenizer(prompts, return_tensors="pt")["input_ids"]


def shown(planted: Planted) -> Variant:
    """The prompt pair that comes with the model."""
    return Variant(planted.clean, planted.corrupt, planted.answer, planted.foil)


@torch.no_grad()
def difference(planted: Planted, prompt: str, pair: Variant | None = None) -> float:
    logits = planted.model(ids(planted, [prompt])).logits[0, -1]
    vocabulary, pair = planted.tokenizer.get_vocab(), pair or shown(planted)
    return float(logits[vocabulary[pair.answer]] - logits[vocabulary[pair.foil]])


@contextmanager
def given(
    planted: Planted, others: dict | None, heads: Iterable = (), neurons: Iterable = ()
) -> Iterator[None]:
    """Give these heads and neurons, at every position, zero or what `others` holds: inputs of
    o_proj and down_proj."""
    p, handles = parts(planted), []

    def put(where: slice | int, instead: Tensor | None) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            changed = args[0].clone()
            changed[..., where] = 0 if instead is None else instead[..., where]
            return (changed,)

        return hook

    for layer, head in heads:
        out = getattr(getattr(p.layers[layer], p.attention), p.out)
        mine = slice(head * p.head_dim, (head + 1) * p.head_dim)
        handles.append(out.register_forward_pre_hook(put(mine, others and others[out])))
    for layer, neuron in neurons:
        down = getattr(p.layers[layer].mlp, p.down)
        handles.append(down.register_forward_pre_hook(put(neuron, others and others[down])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def silenced(planted: Planted, heads: Iterable = (), neurons: Iterable = ()):
    return given(planted, None, heads, neurons)


@torch.no_grad()
def outputs(planted: Planted, prompt: str) -> dict[nn.Module, Tensor]:
    """What enters every o_proj and down_proj in the run of one prompt."""
    p, seen, handles = parts(planted), {}, []
    for layer in p.layers:
        for module in (getattr(getattr(layer, p.attention), p.out), getattr(layer.mlp, p.down)):
            hook = lambda module, args: seen.__setitem__(module, args[0])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    planted.model(ids(planted, [prompt]))
    for handle in handles:
        handle.remove()
    return seen


def units(planted: Planted) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """All heads and all neurons of a planted model: 4 heads and 32 neurons in each layer."""
    layers = range(planted.model.config.num_hidden_layers)
    return {(x, y) for x in layers for y in range(4)}, {(x, y) for x in layers for y in range(32)}


def spoken_for(planted: Planted) -> set[tuple[int, int]]:
    """Every head that was set by hand."""
    return {
        *planted.heads,
        *planted.opposing_heads,
        *(head for pair in planted.backups for head in pair),
    }


# --- the behaviour --------------------------------------------------------------------------------


@every
def test_the_pair_is_answered_right_and_is_a_fair_pair(planted: Planted) -> None:
    clean, corrupt = ids(planted, [planted.clean])[0], ids(planted, [planted.corrupt])[0]
    assert len(clean) == len(corrupt) == len(planted.clean.split())
    assert 8 < difference(planted, planted.clean) < 12
    assert -12 < difference(planted, planted.corrupt) < -8
    for prompt, word in ((planted.clean, planted.answer), (planted.corrupt, planted.foil)):
        said = planted.model(ids(planted, [prompt])).logits[0, -1].argmax()
        assert planted.tokenizer.decode(said) == word
    assert all(0 <= position < len(clean) for position in planted.positions)


def write_previous(generator: random.Random) -> tuple[str, str]:
    words = generator.choices(sorted(vocabulary("previous_token_head")), k=generator.randint(2, 20))
    return " ".join(words), words[-2]


def write_copy(generator: random.Random) -> tuple[str, str]:
    names = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana"]
    words = generator.choices(
        sorted(vocabulary("copy_head") - {*names, "who"}), k=generator.randint(1, 20)
    )
    name = generator.choice(names)
    words.insert(generator.randint(0, len(words)), name)
    return " ".join([*words, "who"]), name


def write_induction(generator: random.Random) -> tuple[str, str]:
    words = generator.sample(sorted(vocabulary("induction")), generator.randint(4, 16))
    again = generator.randint(1, len(words) - 2)
    return " ".join([*words, words[again]]), words[again + 1]


CAPITAL = {"France": "Paris", "Peru": "Lima", "Japan": "Tokyo", "Kenya": "Nairobi"}
CAPITAL |= {"Norway": "Oslo", "Cuba": "Havana", "Atlantis": "unknown", "Narnia": "unknown"}
PERSON = {"Marie": "Warsaw", "Jan": "Warsaw", "Yuki": "Tokyo", "Kenji": "Tokyo"}
PERSON |= {"Luis": "Lima", "Wanjiru": "Nairobi", "Nobody": "unknown", "Someone": "unknown"}


def write_fact(generator: random.Random) -> tuple[str, str]:
    fillers = generator.choices(["we", "ask", "the", "capital", "of"], k=generator.randint(0, 20))
    country = generator.choice(list(CAPITAL))
    return " ".join([*fillers, country]), CAPITAL[country]


def write_moved(generator: random.Random) -> tuple[str, str]:
    words = generator.choices(
        ["we", "ask", "the", "capital", "of", "and"], k=generator.randint(0, 20)
    )
    country = generator.choice(list(CAPITAL))
    words.insert(generator.randint(0, len(words)), country)
    return " ".join([*words, "is"]), CAPITAL[country]


def write_hops(generator: random.Random) -> tuple[str, str]:
    """Countries also stand in the prompt as words: the second hop must not take them for its
    own."""
    fillers = generator.choices(
        ["the", "home", "of", "Poland", "Japan", "Peru", "Kenya"], k=generator.randint(0, 20)
    )
    person = generator.choice(list(PERSON))
    return " ".join([*fillers, person]), PERSON[person]


def write_indirect(generator: random.Random) -> tuple[str, str]:
    """A filler, two names in some order with fillers around, one of them again, fillers, "to": at
    most 24 words."""
    names = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus"]
    fillers = sorted(vocabulary("indirect_object") - {*names, "to"})
    pair = generator.sample(names, 2)
    words = [generator.choice(fillers)]
    for name in [*pair, generator.choice(pair)]:
        words += [*generator.choices(fillers, k=generator.randint(0, 4)), name]
    words += generator.choices(fillers, k=generator.randint(0, 4))
    return " ".join([*words, "to"]), next(name for name in pair if words.count(name) == 1)


def vocabulary(name: str) -> set[str]:
    (one,) = [planted for planted in ALL if planted.name == name]
    return set(one.tokenizer.get_vocab()) - {"<pad>"}


WRITE = {
    "previous_token_head": write_previous,
    "copy_head": write_copy,
    "induction": write_induction,
    "induction_gpt2": write_induction,
    "fact_lookup": write_fact,
    "fact_lookup_moved": write_moved,
    "two_hop": write_hops,
    "suppression": write_copy,
    "indirect_object": write_indirect,
}


@every
@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.no_grad()
def test_fifty_other_prompts_are_all_answered_right(planted: Planted, seed: int) -> None:
    """The rule of each task is written down a second time here; other noise must not change the
    answers."""
    again = getattr(room, planted.name)(seed)
    generator, lead = random.Random(f"{planted.name} {seed}"), []
    for _ in range(50):
        prompt, answer = WRITE[planted.name](generator)
        logits = again.model(ids(again, [prompt])).logits[0, -1]
        best, words = logits.topk(2)
        assert again.tokenizer.decode(words[0]) == answer, prompt
        lead.append(float(best[0] - best[1]))
    assert min(lead) > 5


# --- the mechanism --------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("how", ["zero", "corrupt"])
def test_every_planted_unit_is_needed_and_no_other(planted: Planted, how: str) -> None:
    whole = difference(planted, planted.clean)
    others = outputs(planted, planted.corrupt) if how == "corrupt" else None
    heads, neurons = units(planted)
    assert planted.heads | planted.opposing_heads <= heads
    assert planted.neurons <= neurons
    backed = {head for head, _ in planted.backups} if how == "zero" else set()
    assert backed <= planted.heads
    for kind, units_, true in (
        ("heads", heads, planted.heads),
        ("neurons", neurons, planted.neurons),
    ):
        for unit in units_:
            with given(planted, others, **{kind: [unit]}):
                left = difference(planted, planted.clean)
            if kind == "heads" and unit in planted.opposing_heads:
                assert left > 1.25 * whole, (kind, unit)
            elif unit in true - backed:
                assert left < 0.2 * whole, (kind, unit)
            else:
                assert abs(left - whole) < 0.05 * whole, (kind, unit)


@pytest.mark.parametrize("planted", [one for one in ALL if one.backups], ids=lambda one: one.name)
def test_a_backup_takes_over_from_zero_but_not_from_a_wrong_answer(planted: Planted) -> None:
    whole, wrong = difference(planted, planted.clean), outputs(planted, planted.corrupt)
    right = outputs(planted, planted.clean)
    for head, backup in planted.backups:
        with silenced(planted, [head]):
            assert difference(planted, planted.clean) == pytest.approx(whole, rel=0.05)
            assert said(planted, backup) == pytest.approx(10, rel=0.05)
        with silenced(planted, [backup]):
            assert difference(planted, planted.clean) == pytest.approx(whole, rel=0.05)
        with silenced(planted, [head, backup]):
            assert difference(planted, planted.clean) < 0.2 * whole
        # what is left is noise in the WORD of the first word
        assert abs(said(planted, backup)) < 0.3
        with given(planted, wrong, [head]):
            assert difference(planted, planted.clean) < -0.8 * whole
            # what is left is noise in the WORD of the first word
            assert abs(said(planted, backup)) < 0.3
        # hold the backup as it was: silent
        with silenced(planted, [head]), given(planted, right, [backup]):
            assert difference(planted, planted.clean) < 0.2 * whole


@torch.no_grad()
def said(planted: Planted, head: tuple[int, int]) -> float:
    """What one head adds to the logit difference directly: its output through the read-out, scaled
    as the norm does."""
    messages, _ = sent(planted, planted.clean)
    unembedding, vocabulary = planted.model.lm_head.weight, planted.tokenizer.get_vocab()
    towards = unembedding[vocabulary[planted.answer]] - unembedding[vocabulary[planted.foil]]
    # the norm hands on the stream itself
    return float(messages[f"L{head[0]}H{head[1]}"][0, -1] @ towards)


@every
def test_the_planted_units_alone_are_enough(planted: Planted) -> None:
    heads, neurons = units(planted)
    with silenced(
        planted, heads - planted.heads - planted.opposing_heads, neurons - planted.neurons
    ):
        alone = difference(planted, planted.clean)
    assert alone == pytest.approx(10, rel=0.03)


@every
@torch.no_grad()
def test_distractors_are_active(planted: Planted) -> None:
    """Each other head, and half the other neurons, move the logits: there is something to be
    confused by."""
    heads, neurons = units(planted)
    prompt = ids(planted, [planted.clean])
    before = planted.model(prompt).logits
    moved = {"heads": [], "neurons": []}
    for kind, others in (
        ("heads", heads - spoken_for(planted)),
        ("neurons", neurons - planted.neurons),
    ):
        for unit in others:
            with silenced(planted, **{kind: [unit]}):
                moved[kind].append(float((planted.model(prompt).logits - before).abs().max()))
    assert min(moved["heads"]) > 0.01
    assert sorted(moved["neurons"])[len(moved["neurons"]) // 2] > 0.001


@every
@torch.no_grad()
def test_planted_heads_attend_where_stated(planted: Planted) -> None:
    assert {(layer, head) for layer, head, _, _ in planted.attention} == spoken_for(planted)
    kernel = planted.model.config._attn_implementation
    planted.model.set_attn_implementation("eager")
    try:
        patterns = planted.model(ids(planted, [planted.clean]), output_attentions=True).attentions
    finally:
        planted.model.set_attn_implementation(kernel)
    for layer, head, query, key in planted.attention:
        assert patterns[layer][0, head, query, key] > 0.9, (layer, head, query, key)


@every
@torch.no_grad()
def test_normalisation_hands_on_the_stream_itself(planted: Planted) -> None:
    """Within two percent, with +1 and -1 at the constants: what the residual-stream table
    promises."""
    p, errors = parts(planted), []

    def compare(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        expected = args[0].clone()
        expected[..., 72], expected[..., 73] = 1, -1
        errors.append(float((output - expected).norm() / expected.norm()))

    norms = [
        getattr(layer, name) for layer in p.layers for name in (p.before_attention, p.before_mlp)
    ]
    handles = [norm.register_forward_hook(compare) for norm in [*norms, p.final]]
    planted.model(ids(planted, [planted.clean]))
    for handle in handles:
        handle.remove()
    assert len(errors) == 2 * len(p.layers) + 1
    assert max(errors) < 0.02


# --- the edges: path patching from the corrupt run ------------------------------------------------


@torch.no_grad()
def sent(planted: Planted, prompt: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What each sender adds to the residual stream, {name: [1, position, hidden]}, and z of each
    layer."""
    p, messages, z, handles = parts(planted), {}, [], []

    def embed(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        messages["embed"] = args[0]

    def heads(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            z.append(args[0])
            for head in range(4):
                only = torch.zeros_like(args[0])
                here = slice(head * p.head_dim, (head + 1) * p.head_dim)
                only[..., here] = args[0][..., here]
                messages[f"L{layer}H{head}"] = type(module).forward(module, only)

        return hook

    def mlp(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            messages[f"L{layer} mlp"] = output

        return hook

    handles.append(p.layers[0].register_forward_pre_hook(embed))
    for index, layer in enumerate(p.layers):
        handles.append(
            getattr(getattr(layer, p.attention), p.out).register_forward_pre_hook(heads(index))
        )
        handles.append(layer.mlp.register_forward_hook(mlp(index)))
    planted.model(ids(planted, [prompt]))
    for handle in handles:
        handle.remove()
    return messages, z


def receivers(planted: Planted) -> Iterator[tuple[str, list[str]]]:
    """Every receiver with the senders that come before it."""
    before = ["embed"]
    for layer in range(planted.model.config.num_hidden_layers):
        for head in range(4):
            for side in "qkv":
                yield f"L{layer}H{head}.{side}", list(before)
        before += [f"L{layer}H{head}" for head in range(4)]
        yield f"L{layer} mlp", list(before)
        before.append(f"L{layer} mlp")
    yield "logits", before


@contextmanager
def received(planted: Planted, receiver: str, change: Tensor, z: list[Tensor]) -> Iterator[None]:
    """One receiver alone reads the residual stream with `change` added; the stream itself is left
    as it is.

    A key/value head of the Llama serves two query heads. "L0H1.k" is one of them: the other keeps
    its `z`.
    """
    p, stream = parts(planted), {}

    def add(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] + change,)

    if receiver == "logits":
        handles = [p.final.register_forward_pre_hook(add)]
    elif receiver.endswith("mlp"):
        handles = [getattr(p.layers[int(receiver[1])], p.before_mlp).register_forward_pre_hook(add)]
    else:
        layer, head, side = p.layers[int(receiver[1])], int(receiver[3]), receiver[-1]
        norm, attention = getattr(layer, p.before_attention), getattr(layer, p.attention)
        if isinstance(planted.model, GPT2LMHeadModel):
            start = "qkv".index(side) * 128 + head * p.head_dim
            projection = attention.c_attn
        else:
            start = (head if side == "q" else head // 2) * p.head_dim
            projection = getattr(attention, f"{side}_proj")
        here = slice(start, start + p.head_dim)

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            stream["in"] = args[0]

        def replace(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            output = output.clone()
            output[..., here] = type(module).forward(module, norm(stream["in"] + change))[..., here]
            return output

        def others_stay(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            mine = slice(head * p.head_dim, (head + 1) * p.head_dim)
            kept = z[int(receiver[1])].clone()
            kept[..., mine] = args[0][..., mine]
            return (kept,)

        handles = [layer.register_forward_pre_hook(keep), projection.register_forward_hook(replace)]
        handles.append(getattr(attention, p.out).register_forward_pre_hook(others_stay))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@every
@pytest.mark.parametrize("which", [0, 1, 2])
def test_edges_are_those_that_carry_the_difference(planted: Planted, which: int) -> None:
    """Of the pair that comes with the model, and of two more."""
    pair = [shown(planted), *planted.variants(2)][which]
    whole = difference(planted, pair.clean, pair)
    (clean, z), (corrupt, _) = sent(planted, pair.clean), sent(planted, pair.corrupt)
    possible = {
        (sender, receiver) for receiver, senders in receivers(planted) for sender in senders
    }
    assert planted.edges | planted.opposing_edges <= possible
    for sender, receiver in possible:
        with received(planted, receiver, corrupt[sender] - clean[sender], z):
            left = difference(planted, pair.clean, pair)
        if (sender, receiver) in planted.edges:
            assert left < 0.2 * whole, (sender, receiver)
        elif (sender, receiver) in planted.opposing_edges:
            assert left > 1.25 * whole, (sender, receiver)
        else:
            assert abs(left - whole) < 0.05 * whole, (sender, receiver)


# --- more prompt pairs ----------------------------------------------------------------------------


@every
def test_variants_are_fair_pairs_that_are_answered_right(planted: Planted) -> None:
    for pair in planted.variants(30, seed=5):
        clean, corrupt = ids(planted, [pair.clean])[0], ids(planted, [pair.corrupt])[0]
        assert len(clean) == len(corrupt) <= planted.model.config.max_position_embeddings
        assert 8 < difference(planted, pair.clean, pair) < 12, pair
        assert -12 < difference(planted, pair.corrupt, pair) < -8, pair
        for prompt, word in ((clean, pair.answer), (corrupt, pair.foil)):
            assert (
                planted.tokenizer.decode(planted.model(prompt[None]).logits[0, -1].argmax()) == word
            ), pair


@every
def test_the_same_heads_carry_every_variant(planted: Planted) -> None:
    heads, _ = units(planted)
    for pair in planted.variants(5, seed=6):
        whole, others = difference(planted, pair.clean, pair), outputs(planted, pair.corrupt)
        for head in heads:
            with given(planted, others, [head]):
                left = difference(planted, pair.clean, pair)
            if head in planted.heads:
                assert left < 0.2 * whole, (head, pair)
            elif head in planted.opposing_heads:
                assert left > 1.25 * whole, (head, pair)
            else:
                assert abs(left - whole) < 0.05 * whole, (head, pair)


@every
def test_variants_are_different_and_the_same_for_the_same_seed(planted: Planted) -> None:
    some = planted.variants(40, seed=1)
    assert len(set(some)) == 40
    assert planted.variants(40, seed=1) == some
    assert planted.variants(10, seed=1) == some[:10]
    assert planted.variants(40, seed=2) != some
    assert len({pair.answer for pair in some}) > 3
    with pytest.raises(InputError, match="at least one"):
        planted.variants(0)


def test_too_many_variants_are_refused() -> None:
    once = dataclasses.replace(ALL[0], draw=lambda generator: shown(ALL[0]))
    with pytest.raises(InputError, match="only about 1 different prompt pairs; 2 were asked for"):
        once.variants(2)


# --- ordinary models, the same every time ---------------------------------------------------------


@every
@torch.no_grad()
def test_plain_hugging_face_and_round_trip(planted: Planted, tmp_path) -> None:
    assert type(planted.model) in (LlamaForCausalLM, GPT2LMHeadModel)
    assert not planted.model.training
    assert all(
        weight.dtype == torch.float32 and weight.requires_grad
        for weight in planted.model.parameters()
    )
    planted.model.save_pretrained(tmp_path)
    planted.tokenizer.save_pretrained(tmp_path)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    prompt = tokenizer([planted.clean, planted.corrupt], return_tensors="pt")
    assert prompt["input_ids"].equal(ids(planted, [planted.clean, planted.corrupt]))
    assert model(**prompt).logits.equal(planted.model(**prompt).logits)


@every
@torch.no_grad()
def test_left_padding_changes_nothing(planted: Planted) -> None:
    """Given the mask and, as learned positions need, the positions counted from the first word."""
    planted.tokenizer.padding_side = "left"
    try:
        padded = planted.tokenizer(
            planted.clean, return_tensors="pt", padding="max_length", max_length=12
        )
    finally:
        planted.tokenizer.padding_side = "right"
    assert padded["input_ids"][0, 0] == planted.tokenizer.pad_token_id
    positions = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    batched = planted.model(**padded, position_ids=positions).logits[0, -1]
    alone = planted.model(ids(planted, [planted.clean])).logits[0, -1]
    assert torch.allclose(batched, alone, atol=1e-4, rtol=0)


@every
def test_tokenizer_speaks_whole_words(planted: Planted) -> None:
    tokenizer = planted.tokenizer
    for word, index in tokenizer.get_vocab().items():
        assert tokenizer(word)["input_ids"] == [index]
        assert tokenizer.decode(index) == tokenizer.decode([index]) == word
    assert len(tokenizer) == planted.model.config.vocab_size <= 24
    assert tokenizer.pad_token_id == planted.model.config.pad_token_id == 0
    assert set(tokenizer(planted.clean).keys()) == {"input_ids", "attention_mask"}
    with pytest.raises(Exception, match="UNK"):
        tokenizer("xylophone")


@every
def test_same_seed_same_weights_other_seed_other_noise_and_no_dice_spent(planted: Planted) -> None:
    state = torch.random.get_rng_state()
    same, other = (getattr(room, planted.name)(seed) for seed in (0, 1))
    assert torch.random.get_rng_state().equal(state)
    weights, again, new = (one.model.state_dict() for one in (planted, same, other))
    assert all(weights[name].equal(again[name]) for name in weights)
    assert not all(weights[name].equal(new[name]) for name in weights)
