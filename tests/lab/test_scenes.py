"""Scenes: what is drawn is what is said. Masks, colours, shapes and answers are worked out again
from the pixels."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import ndimage

from stratoscope.errors import InputError
from stratoscope.lab import scenes
from stratoscope.lab.scenes.outlines import OUTLINES, Part

KINDS = tuple(scenes.KINDS)
SIZES = (48, 64, 224)


def some(n: int, **more: object) -> list[scenes.Scene]:
    return [
        scenes.scene(i, **({"things": (1, 6), "letters": 0.2, "strokes": 2} | more))
        for i in range(n)
    ]


# --- an eye of its own: no pillow, no supersampled canvas -----------------------------------------


def inside(part: Part, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points are in the polygon (a ray crosses its edge an odd number of times) or under
    the pen."""
    found = np.zeros(x.shape, dtype=bool)
    for (a, b), (c, d) in part.segments:
        along = np.clip(
            ((x - a) * (c - a) + (y - b) * (d - b)) / ((c - a) ** 2 + (d - b) ** 2), 0, 1
        )
        found |= np.hypot(x - a - along * (c - a), y - b - along * (d - b)) <= part.pen / 2
    if part.filled:
        odd = np.zeros(x.shape, dtype=bool)
        for (a, b), (c, d) in part.segments:
            if b != d:
                odd ^= ((b > y) != (d > y)) & (x < (c - a) * (y - b) / (d - b) + a)
        found |= odd
    return found


def share(shape: str, thing: scenes.Thing, pixels: int, window: tuple[int, ...]) -> np.ndarray:
    """How much of each pixel of the window the shape covers at the thing's place, from 7 x 7 points
    in it."""
    left, top, right, bottom = window
    across, down = (
        (np.arange(a * 7, b * 7) + 0.5) / 7 / pixels for a, b in ((left, right), (top, bottom))
    )
    x, y = np.meshgrid((across - thing.x) / thing.radius, (down - thing.y) / thing.radius)
    covered = np.zeros(x.shape, dtype=bool)
    for part in OUTLINES[shape]:
        covered |= inside(part, x, y)
    return covered.reshape(bottom - top, 7, right - left, 7).mean(axis=(1, 3))


def around(box: list[int], pixels: int) -> tuple[int, int, int, int]:
    """The box and two pixels more on each side."""
    left, top, right, bottom = box
    return max(left - 2, 0), max(top - 2, 0), min(right + 2, pixels), min(bottom + 2, pixels)


def cut(mask: np.ndarray, window: tuple[int, int, int, int]) -> np.ndarray:
    return mask[window[1] : window[3], window[0] : window[2]]


@dataclass
class Seen:
    """One thing as the picture shows it."""

    colour: str
    shape: str
    size: str
    x: float
    y: float

    @property
    def words(self) -> set[str]:
        return {self.colour, self.size, "thing", *self.shape.split()}


def look(scene: scenes.Scene) -> list[Seen]:
    """Colour from the pixels, shape from the mask that fits best, size and place from the box."""
    found = []
    palette = np.array(list(scenes.COLOURS.values()))
    for thing, mask, box in zip(scene.things, scene.masks, scene.boxes.tolist()):
        core = ndimage.binary_erosion(mask) if ndimage.binary_erosion(mask).sum() > 8 else mask
        middle = np.median(scene.picture[core], axis=0)
        colour = list(scenes.COLOURS)[np.abs(palette - middle).sum(axis=1).argmin()]
        window = around(box, scene.pixels)
        shown = cut(mask, window)
        overlap = {}
        for shape in OUTLINES:
            drawn = share(shape, thing, scene.pixels, window) >= 0.5
            overlap[shape] = (drawn & shown).sum() / (drawn | shown).sum()
        left, top, right, bottom = box
        size = "large" if max(right - left, bottom - top) / scene.pixels > 0.235 else "small"
        middle_x, middle_y = (left + right) / 2 / scene.pixels, (top + bottom) / 2 / scene.pixels
        found.append(Seen(colour, max(overlap, key=overlap.__getitem__), size, middle_x, middle_y))
    return found


def meant(seen: list[Seen], name: str) -> Seen:
    """The one thing that the words fit."""
    [one] = [thing for thing in seen if set(name.split()) <= thing.words]
    return one


def ahead(relation: str, a: Seen, b: Seen) -> bool:
    return {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[
        relation
    ]


def answer(seen: list[Seen], text: str) -> str:
    """The right answer, from what is seen."""
    if found := re.fullmatch(r"what (colour|shape|size) is the (.+) \?", text):
        return getattr(meant(seen, found[2]), found[1])
    if found := re.fullmatch(r"which letter is (.+) \?", text):
        return meant(seen, f"letter {found[1]}").shape.split()[1]
    if found := re.fullmatch(r"how many (.+) are there \?", text):
        name = re.sub(r"es$", "", found[1]) if found[1] == "crosses" else found[1].removesuffix("s")
        count = sum(set(name.split()) <= thing.words for thing in seen)
        return "zero one two three four five six".split()[count]
    if found := re.fullmatch(r"is there a (.+) \?", text):
        return "yes" if any(set(found[1].split()) <= thing.words for thing in seen) else "no"
    found = re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+) \?", text)
    assert found, text
    return "yes" if ahead(found[2], meant(seen, found[1]), meant(seen, found[3])) else "no"


# --- the pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", SIZES)
def test_masks_are_what_is_drawn(pixels: int) -> None:
    for scene in some(5, pixels=pixels):
        for thing, mask, box in zip(scene.things, scene.masks, scene.boxes.tolist()):
            window = around(box, pixels)
            covered, shown = share(thing.shape, thing, pixels, window), cut(mask, window)
            sure = np.abs(covered - 0.5) > 0.2
            assert (shown == (covered > 0.5))[sure].all(), thing
            if pixels == 224:
                assert abs(shown.sum() / covered.sum() - 1) < 0.04


def test_each_pixel_has_the_colour_of_its_thing_and_the_rest_is_pale() -> None:
    for scene in some(12):
        shown = scene.picture.astype(int)
        assert shown.shape == (64, 64, 3)
        near = np.asarray(ndimage.binary_dilation(scene.masks.any(axis=0)), dtype=bool)
        assert shown[~near].min() > 165  # ground, strokes and shadow
        for thing, mask in zip(scene.things, scene.masks):
            core = ndimage.binary_erosion(mask, np.ones((3, 3)))
            assert np.abs(shown[core] - scenes.COLOURS[thing.colour]).max(initial=0) <= 18


def test_nothing_touches_or_leaves_the_picture() -> None:
    for pixels in SIZES:
        for scene in some(40, pixels=pixels):
            assert scene.masks.sum(axis=0).max() == 1
            regions = np.asarray(ndimage.label(scene.masks.any(axis=0))[0])
            owners = {
                region: {i for i, m in enumerate(scene.masks) if m[regions == region].any()}
                for region in np.unique(regions)
            }
            assert all(len(things) == 1 for region, things in owners.items() if region)
            assert all(ndimage.label(mask, np.ones((3, 3)))[1] == 1 for mask in scene.masks)
            for mask, (left, top, right, bottom) in zip(scene.masks, scene.boxes.tolist()):
                assert 0 < left < right < pixels
                assert 0 < top < bottom < pixels
                assert mask[top:bottom, left:right].sum() == mask.sum() >= 0.008 * pixels**2
                assert mask[top].any()
                assert mask[bottom - 1].any()
                assert mask[:, left].any()
                assert mask[:, right - 1].any()


def test_the_same_for_the_same_seed_and_another_for_another() -> None:
    first, again, other, next_one = (
        scenes.scene(i, seed=s) for i, s in ((5, 0), (5, 0), (5, 1), (6, 0))
    )
    assert first.things == again.things
    assert (first.picture == again.picture).all()
    assert scenes.questions(first, 6) == scenes.questions(again, 6)
    assert scenes.questions(first, 6) != scenes.questions(first, 6, seed=1)
    assert first.things != other.things != next_one.things
    # the size of the picture changes nothing else
    assert scenes.scene(5, pixels=200).things == first.things
    assert [(t.name, t.size, round(t.x, 3)) for t in scenes.scene(0).things] == GOLDEN


def test_colours_can_be_told_apart() -> None:
    palette = np.array([*scenes.COLOURS.values(), (244, 240, 232)])
    gaps = np.abs(palette[:, None] - palette).sum(axis=-1) + 999 * np.eye(len(palette))
    assert gaps.min() > 80


def test_shapes_and_colours_can_be_chosen() -> None:
    chosen = some(20, shapes=("ring",), colours=("red", "blue"), letters=0.0, things=(3, 3))
    assert {thing.shape for scene in chosen for thing in scene.things} == {"ring"}
    assert {thing.colour for scene in chosen for thing in scene.things} == {"red", "blue"}
    assert {len(scene.things) for scene in chosen} == {3}


@pytest.mark.parametrize(
    "wrong",
    [
        {"things": (0, 2)},
        {"things": (3, 2)},
        {"things": (1, 7)},
        {"pixels": 16},
        {"shapes": ("blob",)},
        {"shapes": ("red",)},
        {"colours": ()},
        {"colours": ("square",)},
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong: dict) -> None:
    with pytest.raises(InputError):
        scenes.scene(0, **wrong)


# --- the words ------------------------------------------------------------------------------------


def test_every_answer_is_the_one_that_the_picture_gives() -> None:
    asked = 0
    for scene in some(25):
        seen = look(scene)
        for question in scenes.questions(scene, 12, kinds=KINDS):
            assert answer(seen, question.text) == question.answer, (question, seen)
            asked += 1
    assert asked > 230


def test_questions_speak_of_the_things_they_name() -> None:
    for scene in some(60):
        for question in scenes.questions(
            scene, 12, kinds=("colour", "shape", "relation", "size", "letter")
        ):
            names = re.findall(r"the (.+?) (?:left of|right of|above|below|\?)", question.text)
            seen = [Seen(t.colour, t.shape, t.size, t.x, t.y) for t in scene.things]
            if names:
                assert [seen.index(meant(seen, name)) for name in names] == list(question.things)


def test_captions_are_true() -> None:
    related = 0
    for scene in some(80):
        listed, _, relation = scenes.caption(scene).partition(" ; the ")
        assert re.split(r", | and ", listed) == [f"a {t.size} {t.name}" for t in scene.things]
        if relation:
            first, word, second = re.fullmatch(
                r"(.+) is (left of|right of|above|below) the (.+)", relation
            ).groups()
            seen = [Seen(t.colour, t.shape, t.size, t.x, t.y) for t in scene.things]
            assert ahead(word, meant(seen, first), meant(seen, second))
            related += 1
    assert related > 50


def test_questions_are_different_and_balanced() -> None:
    answers: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for scene in some(700, things=(2, 5)):
        asked = scenes.questions(scene, 8, kinds=KINDS)
        assert len({question.text for question in asked}) == len(asked) >= 6
        for question in asked:
            answers[question.kind].append(question.answer)
    for kind in ("relation", "presence"):
        yes = answers[kind].count("yes") / len(answers[kind])
        assert abs(yes - 0.5) < 2.5 * 0.5 / len(answers[kind]) ** 0.5, (kind, yes)
    most = {kind: max(map(told.count, set(told))) / len(told) for kind, told in answers.items()}
    assert most["colour"] < 0.17  # of eight
    assert most["shape"] < 0.17
    assert most["letter"] < 0.2  # of ten
    assert most["count"] < 0.45
    assert most["size"] < 0.6


def test_every_word_is_in_the_vocabulary() -> None:
    said = set()
    for scene in some(300):
        texts = [scenes.caption(scene).replace(",", " ,")]
        texts += [f"{q.text} {q.answer}" for q in scenes.questions(scene, 8, kinds=KINDS)]
        said |= {word for text in texts for word in text.split()}
    assert said <= set(scenes.WORDS)
    assert len(said) > 0.95 * len(scenes.WORDS)
    assert len(set(scenes.WORDS)) == len(scenes.WORDS)


def test_clear_differences_only() -> None:
    left, near = (
        scenes.Thing("ring", "red", "small", 0.5, 0.5, 0.1),
        scenes.Thing("ring", "red", "small", 0.55, 0.8, 0.1),
    )
    assert scenes.stands(left, "above", near)
    assert not scenes.stands(left, "left of", near)
    assert not scenes.stands(near, "left of", left)


def test_a_kind_of_question_that_is_not_there() -> None:
    with pytest.raises(InputError, match="taste"):
        scenes.questions(scenes.scene(0), kinds=("taste",))


GOLDEN = [("blue triangle", "small", 0.243), ("purple cross", "small", 0.714)]
