"""What the vision miniatures share: scenes as pixels, a tokenizer of whole words, an image
processor, a first lesson.

A vision tower this small does not come to see shapes within minutes from answers or captions alone:
it stays at the colours. So while it trains it also names what each patch shows, through a linear
map that is thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stratoscope.lab.scenes import COLOURS, SHAPES, WORDS, Scene, Thing

PAD, EOS, BOS, UNKNOWN, IMAGE = SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>")
# of pixel values from 0 to 1: about the ground, and the contrast of things to it
MEAN, SPREAD = 0.93, 0.3
# of what is said of a patch: shape, colour, size, centre
WIDTHS = [len(SHAPES) + 1, len(COLOURS) + 1, 1, 2]
HELD_OUT = 10**9  # scenes from this index on are never trained on
NOTE = (
    "While it trained, a linear map from its vision tower's last layer named the shape, colour, "
    "size and centre of the "
    "thing in each patch; the map, counted among the parameters, is not part of the model."
)


def pixels(scenes: Sequence[Scene]) -> Float[Tensor, "example rgb=3 row column"]:
    """Pictures as a vision tower takes them, the ground near 0: the numbers that `image_processor`
    gives."""
    pictures = torch.from_numpy(np.stack([scene.picture for scene in scenes]))
    return (pictures.permute(0, 3, 1, 2).float() / 255 - MEAN) / SPREAD


class Taught(nn.Module):
    """A model while it learns, with the linear map from each patch of its vision tower to what is
    in it."""

    def __init__(self, model: Any, dim: int) -> None:
        super().__init__()
        self.model, self.names = model, nn.Linear(dim, sum(WIDTHS) + 1)

    def naming(
        self, patches: Float[Tensor, "example patch dim"], scenes: Sequence[Scene]
    ) -> Float[Tensor, ""]:
        """Mean loss of saying what each patch shows, and whether the middle of a thing is in it."""
        side = round(patches.shape[1] ** 0.5)
        true = facts([thing for scene in scenes for thing in scene.things])[
            contents(scenes, side).flatten()
        ]
        middle = torch.zeros(len(scenes), side, side)
        for row, scene in enumerate(scenes):
            for thing in scene.things:
                middle[row, int(thing.y * side), int(thing.x * side)] = 1
        names = self.names(patches).flatten(0, 1)
        return described(names[:, 1:], true) + nn.functional.binary_cross_entropy_with_logits(
            names[:, 0], middle.flatten()
        )


def contents(scenes: Sequence[Scene], side: int) -> Int[Tensor, "example patch"]:
    """Which thing covers most of each of side * side patches, counted through all the scenes.

    -1 where a sixteenth of the patch or less is covered.
    """
    contents, first = [], 0
    for scene in scenes:
        masks = torch.from_numpy(scene.masks).float()[:, None]
        most, which = nn.functional.avg_pool2d(masks, scene.pixels // side).flatten(1).max(dim=0)
        contents.append((which + first).where(most > 1 / 16, -1))
        first += len(scene.things)
    return torch.stack(contents)


def facts(things: Sequence[Thing]) -> Float[Tensor, "thing fact=5"]:
    """Shape and colour (numbers from 1), whether it is large, x and y (-1 to 1) of each; then a row
    of zeros: nothing."""
    shapes, colours = (
        {name: number for number, name in enumerate(words, 1)} for words in (SHAPES, COLOURS)
    )
    rows = [
        (shapes[t.shape], colours[t.colour], t.size == "large", 2 * t.x - 1, 2 * t.y - 1)
        for t in things
    ]
    return torch.tensor([*rows, (0, 0, 0, 0, 0)], dtype=torch.float)


def described(
    output: Float[Tensor, "row output"], true: Float[Tensor, "row fact=5"]
) -> Float[Tensor, ""]:
    """Mean loss of shape, colour and size, plus twice the squared error of the centre; the last two
    of things only."""
    shape, colour, large, centre = output.split(WIDTHS, dim=1)
    thing = true[:, 0] > 0
    return (
        nn.functional.cross_entropy(shape, true[:, 0].long())
        + nn.functional.cross_entropy(colour, true[:, 1].long())
        + nn.functional.binary_cross_entropy_with_logits(large[thing, 0], true[thing, 2])
        + 2 * (centre[thing] - true[thing, 3:]).square().mean()
    )


def image_processor(size: int) -> Any:
    """Brings any picture to `size` by `size`, and the ground to about 0."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"height": size, "width": size},
        do_center_crop=False,
        image_mean=[MEAN] * 3,
        image_std=[SPREAD] * 3,
    )


def words(*, start: bool, end: bool) -> Any:
    """A tokenizer that knows every word said of scenes, one token each; texts begin with <bos> and
    end with <eos>, or not."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = f"{BOS + ' ' if start else ''}$A{' ' + EOS if end else ''}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, ids[word]) for word in (BOS, EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
    )
