"""The vision miniatures, made so small that they learn nothing: what is made is whole, ordinary,
and what it says it is."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stratoscope
from stratoscope.engine.trace import capture
from stratoscope.lab import miniatures, scenes
from stratoscope.lab.miniatures import _scenes, tiny_clip, tiny_llava, tiny_vit
from stratoscope.layers import activation_patching, logit_lens
from stratoscope.models.prove import prove

SMALL: dict[str, dict[str, Any]] = {
    "tiny-vit": {"layers": 2, "dim": 16, "heads": 2, "steps": 2, "batch": 4, "held_out": 12},
    "tiny-clip": {"layers": 2, "dim": 16, "heads": 2, "steps": 2, "batch": 4, "held_out": 12},
    "tiny-llava": {
        "layers": 2,
        "dim": 16,
        "heads": 2,
        "vision_layers": 2,
        "vision_dim": 16,
        "steps": 3,
        "batch": 3,
    }
    | {"held_out": 6},
}
SIZE, PATCHES = 48, 36


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Each miniature of the smallest size, made once in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRATOSCOPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield {name: miniatures.make(name, **sizes) for name, sizes in SMALL.items()}


def drawn(n: int) -> list[scenes.Scene]:
    return [scenes.scene(i, seed="test", pixels=SIZE) for i in range(n)]


def asked(lm: Any, scene: scenes.Scene, text: str) -> dict[str, torch.Tensor]:
    return dict(lm.processor(images=scene.picture, text=f"<image> {text}", return_tensors="pt"))


# --- what all three are ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_the_card_says_what_it_was_made_from(name: str, folders: dict[str, Path]) -> None:
    card = json.loads((folders[name] / "card.json").read_text())
    assert card["name"] == name
    assert card["steps"] == SMALL[name]["steps"]
    assert "pictures" in card["data"]["scenes"]
    assert "linear map" in card["notes"][-1]
    assert all(np.isfinite(loss) for _, loss in card["curve"])
    assert all(0 <= value <= 1 for what, value in card["results"].items() if what != "retrieval_of")


@pytest.mark.parametrize("name", SMALL)
def test_the_picture_processor_gives_what_training_saw(name: str, folders: dict[str, Path]) -> None:
    from transformers import AutoImageProcessor

    pictures = drawn(3)
    reader = AutoImageProcessor.from_pretrained(folders[name], use_fast=False)
    given = reader([scene.picture for scene in pictures], return_tensors="pt")["pixel_values"]
    assert given.shape == (3, 3, SIZE, SIZE)
    assert (given - _scenes.pixels(pictures)).abs().max() < 1e-5


def test_the_tokenizer_knows_every_word(folders: dict[str, Path]) -> None:
    lm = stratoscope.load(folders["tiny-clip"])
    text = " ".join(scenes.WORDS)
    ids = lm.tokenizer(text)["input_ids"]
    assert lm.tokenizer.unk_token_id not in ids
    assert len(set(ids)) == len(ids) == len(scenes.WORDS) + 2
    assert (
        lm.tokenizer("what colour is the square?", add_special_tokens=False)["input_ids"]
        == lm.tokenizer("what colour is the square ?", add_special_tokens=False)["input_ids"]
    )
    assert lm.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert lm.tokenizer("zebra", add_special_tokens=False)["input_ids"] == [
        lm.tokenizer.unk_token_id
    ]


def test_what_patches_show() -> None:
    pictures = drawn(6)
    things = [thing for scene in pictures for thing in scene.things]
    which, first = _scenes.contents(pictures, 6), 0
    for row, scene in enumerate(pictures):
        for patch in range(PATCHES):
            down, across = divmod(patch, 6)
            inside = scene.masks[:, 8 * down : 8 * down + 8, 8 * across : 8 * across + 8].sum(
                axis=(1, 2)
            )
            assert which[row, patch] == (first + inside.argmax() if inside.max() > 4 else -1)
        first += len(scene.things)
    names = [None, *scenes.SHAPES], [None, *scenes.COLOURS]
    for thing, (shape, colour, large, x, y) in zip(things, _scenes.facts(things).tolist()):
        assert (
            names[0][int(shape)],
            names[1][int(colour)],
            ["small", "large"][int(large)],
        ) == thing[:3]
        assert (x, y) == pytest.approx((2 * thing.x - 1, 2 * thing.y - 1), abs=1e-6)
    assert not _scenes.facts(things)[-1].any()


# --- tiny-vit -------------------------------------------------------------------------------------


def test_vit_loads_and_is_proved(folders: dict[str, Path]) -> None:
    lm = stratoscope.load(folders["tiny-vit"], tokenizer=False)
    assert list(lm.model.config.id2label.values()) == list(scenes.SHAPES)
    prove(lm, {"pixel_values": _scenes.pixels(drawn(2))})


def test_vit_is_asked_for_the_only_large_thing() -> None:
    pictures = tiny_vit.pictures("test", 0, 20, SIZE)
    for scene, label in zip(pictures, tiny_vit.labels(pictures).tolist()):
        widths = (scene.boxes[:, 2:] - scene.boxes[:, :2]).max(axis=1)
        assert scene.things[widths.argmax()].shape == list(scenes.SHAPES)[label]
        assert sorted(widths)[-1] > 1.15 * sorted(widths)[-2]
    assert [scene.things for scene in tiny_vit.pictures("test", 5, 3, SIZE)] == [
        s.things for s in pictures[5:8]
    ]


# --- tiny-clip ------------------------------------------------------------------------------------


def test_clip_loads_and_is_proved(folders: dict[str, Path]) -> None:
    lm = stratoscope.load(folders["tiny-clip"])
    [scene] = drawn(1)
    both = lm.processor(images=[scene.picture], text=[scenes.caption(scene)], return_tensors="pt")
    prove(lm, dict(both))
    assert lm.model(**both).logits_per_image.shape == (1, 1)


def test_clip_reads_a_caption_alike_in_any_company(folders: dict[str, Path]) -> None:
    lm = stratoscope.load(folders["tiny-clip"])
    captions = [scenes.caption(scene) for scene in drawn(5)]
    assert max(len(lm.tokenizer(text)["input_ids"]) for text in captions) <= tiny_clip.CONTEXT
    together = lm.model.get_text_features(
        **lm.tokenizer(captions, padding=True, return_tensors="pt")
    ).pooler_output
    for row, text in enumerate(captions):
        alone = lm.model.get_text_features(**lm.tokenizer(text, return_tensors="pt")).pooler_output
        assert (together[row] - alone[0]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", tiny_clip.EXCHANGED)
def test_exchanged_captions_are_false_in_one_word(kind: str) -> None:
    found = 0
    for scene in drawn(40):
        caption = scenes.caption(scene)
        false = tiny_clip.exchanged(caption, tiny_clip.EXCHANGED[kind])
        assert false == tiny_clip.exchanged(caption, tiny_clip.EXCHANGED[kind])
        if not false:
            continue
        true, wrong = (text.replace(",", " ,").split() for text in (caption, false))
        assert len(true) == len(wrong)
        assert sum(a != b for a, b in zip(true, wrong)) == 1
        if kind == "relation":
            assert caption.split(" ; ")[0] == false.split(" ; ")[0]
        else:
            listed = false.replace(" ,", ",").split(" ; ")[0]
            things = Counter(f"a {t.size} {t.name}" for t in scene.things)
            assert Counter(re.split(r", | and ", listed)) != things
        found += 1
    assert found > 30


# --- tiny-llava -----------------------------------------------------------------------------------


def test_llava_loads_is_proved_and_answers(folders: dict[str, Path]) -> None:
    lm = stratoscope.load(folders["tiny-llava"])
    inputs = asked(lm, drawn(1)[0], "what colour is the square?")
    assert inputs["input_ids"].shape == (1, 1 + PATCHES + 6)
    prove(lm, inputs)
    answer = lm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_llava_shows_its_sites(folders: dict[str, Path]) -> None:
    lm = stratoscope.load(folders["tiny-llava"])
    inputs = asked(lm, drawn(1)[0], "how many things are there?")
    names = ("vision.layers.*.resid_post", "projector", "layers.*.attn.pattern")
    seen = capture(lm, inputs, *names)
    assert seen.stack(names[0]).shape == (2, 1, 1 + PATCHES, 16)  # a class token before the patches
    assert seen[names[1]].shape[-2:] == (PATCHES, 16)
    words = inputs["input_ids"].shape[1]
    assert seen.stack(names[2]).shape == (2, 1, 2, words, words)
    batch = lm.batch(inputs)
    assert batch.image is not None
    assert batch.image.sum() == PATCHES


def test_methods_run_on_llava_unchanged(folders: dict[str, Path]) -> None:
    lm = stratoscope.load(folders["tiny-llava"])
    one, two = (asked(lm, scene, "what colour is the square?") for scene in drawn(2))
    lens = logit_lens.measure(lm, one, answer="red", top=2)
    assert lens["answer_rank"].shape == (1, 3, 1 + PATCHES + 6)
    patched = activation_patching.measure(lm, one, corrupt=two, answer="red", foil="blue")
    effect = patched["effect"]
    assert effect.shape == (1, 2, 1 + PATCHES + 6)
    # <bos> knows nothing of the picture
    assert float(effect[0, 0, 0]) == pytest.approx(0, abs=1e-4)
    # nor do the words, before layer 0
    assert float(abs(effect[0, 0, 1 + PATCHES :]).max()) == pytest.approx(0, abs=1e-4)
    assert float(abs(effect[0, 0, 1 : 1 + PATCHES]).max()) > 1e-3


@torch.no_grad()
def test_questions_that_share_a_row_do_not_see_each_other(folders: dict[str, Path]) -> None:
    lm = stratoscope.load(folders["tiny-llava"])
    rows = [(scene, scenes.questions(scene, 5, kinds=tiny_llava.KINDS)) for scene in drawn(3)]
    losses = []
    for scene, questions in rows:
        for question in questions:
            ids = asked(lm, scene, f"{question.text} {question.answer}")
            logits = lm.model(**ids).logits[0, -2:]  # at "?" and at the answer
            word = lm.tokenizer.convert_tokens_to_ids(question.answer)
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits, torch.tensor([word, lm.tokenizer.eos_token_id])
                )
            )
    answers, *_ = tiny_llava.packed_losses(
        tiny_llava.Pupil(lm.model, 16, 16), rows, lm.tokenizer, PATCHES
    )
    assert float(answers) == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


def test_where_things_are_named() -> None:
    rows = [(scene, scenes.questions(scene, 8, kinds=tiny_llava.KINDS)) for scene in drawn(5)]
    tokenizer = _scenes.words(start=True, end=False)
    ids = tiny_llava.pack(rows, tokenizer, PATCHES)[0]
    names, pairs = tiny_llava.spoken_of(rows, PATCHES)
    assert len(names) == sum(
        len(q.things) for _, questions in rows for q in questions if q.kind != "count"
    )
    for row, column, thing in names:
        word = tokenizer.convert_ids_to_tokens(int(ids[row, column]))
        assert word in ("thing", thing.colour, thing.shape)
        assert (
            word != "thing"
            or tokenizer.convert_ids_to_tokens(int(ids[row, column - 1])) == thing.colour
        )
    asked = [q for _, questions in rows for q in questions if q.kind == "relation"]
    assert len(pairs) == len(asked) > 3
    for (row, column, first, second, way), question in zip(pairs, asked):
        assert tokenizer.convert_ids_to_tokens(int(ids[row, column])) == "?"
        assert (
            tuple(rows[row][0].things.index(thing) for thing in (first, second)) == question.things
        )
        assert f" {way} " in question.text


def test_what_a_pair_is_taught_by_hand() -> None:
    """A map that says nothing: twice the squared way between the things, and one in four
    directions."""
    pupil = tiny_llava.Pupil(torch.nn.Identity(), 4, 8)
    torch.nn.init.zeros_(pupil.apart.weight)
    torch.nn.init.zeros_(pupil.apart.bias)
    first, second = next(scene for scene in drawn(9) if len(scene.things) > 1).things[:2]
    hidden, away = (
        torch.ones(1, 3, 8),
        torch.tensor([2 * (first.x - second.x), 2 * (first.y - second.y)]),
    )
    plain = pupil.told_apart(hidden, [(0, 2, first, second, "above")])
    assert plain.item() == pytest.approx(2 * away.square().mean().item() + np.log(4), rel=1e-5)
    with torch.no_grad():
        pupil.apart.bias += torch.tensor([*away, 0, 0, 30, 0])
    assert pupil.told_apart(hidden, [(0, 2, first, second, "above")]).item() == pytest.approx(
        0, abs=1e-5
    )
    assert pupil.told_apart(hidden, [(0, 2, first, second, "left")]).item() == pytest.approx(
        30, rel=1e-3
    )
    assert pupil.told_apart(hidden, []).item() == 0


def test_llava_is_judged_as_it_is_used(folders: dict[str, Path]) -> None:
    lm = stratoscope.load(folders["tiny-llava"])
    rows = [(scene, scenes.questions(scene, 4, kinds=tiny_llava.KINDS)) for scene in drawn(4)]
    hits = []
    for scene, questions in rows:
        for question in questions:
            guess = int(lm.model(**asked(lm, scene, question.text)).logits[0, -1].argmax())
            hits.append(lm.tokenizer.convert_ids_to_tokens(guess) == question.answer)
    judged = tiny_llava.judged(lm.model, rows, lm.tokenizer, PATCHES)
    assert judged["accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert {f"accuracy_{kind}" for kind in tiny_llava.KINDS} < judged.keys()


def test_guessers_without_a_picture() -> None:
    [scene] = drawn(1)
    question = lambda text, answer: scenes.Question("colour", text, answer, ())  # noqa: E731
    known = [(scene, [question("a ?", "red")] * 3 + [question("b ?", "blue")] * 2)]
    asks = [
        (
            scene,
            [
                question("a ?", "red"),
                question("b ?", "blue"),
                question("c ?", "red"),
                question("c ?", "blue"),
            ],
        )
    ]
    guessed = tiny_llava.guessed(known, asks)
    assert guessed["majority"] == 0.5  # always red
    assert guessed["blind"] == 0.75  # red, blue, and red for what it never heard


def test_the_same_seed_gives_the_same_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRATOSCOPE_CACHE", str(tmp_path))
        again = miniatures.make("tiny-llava", **SMALL["tiny-llava"])
    first, second = (
        load_file(folder / "model.safetensors") for folder in (folders["tiny-llava"], again)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
