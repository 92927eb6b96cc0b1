"""What the vision miniatures share: scenes as pixels, a tokenizer of whole words, an image processor, a first lesson.

A vision tower this small does not come to see shapes within minutes from answers or captions alone: it stays at the
colours. So while it trains it also names what each patch shows, through a linear map that is thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stratoscope.lab.scenes import COLOURS, SHAPES, WORDS, Scene

PAD, EOS, BOS, UNKNOWN, IMAGE = SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>")
MEAN, SPREAD = 0.93, 0.3  # of pixel values from 0 to 1: about the ground, and the contrast of things to it
HELD_OUT = 10**9  # scenes from this index on are never trained on
NOTE = (
    "While it trained, a linear map from its vision tower's last layer named the shape, the colour and the centre of the "
    "thing in each patch; the map, counted among the parameters, is not part of the model."
)


def pixels(scenes: Sequence[Scene]) -> Float[Tensor, "example rgb=3 row column"]:
    """Pictures as a vision tower takes them, the ground near 0: the numbers that `image_processor` gives."""
    pictures = torch.from_numpy(np.stack([scene.picture for scene in scenes]))
    return (pictures.permute(0, 3, 1, 2).float() / 255 - MEAN) / SPREAD


class Taught(nn.Module):
    """A model while it learns, with the linear map from each patch of its vision tower to what is in it."""

    def __init__(self, model: Any, dim: int) -> None:
        super().__init__()
        self.model, self.names = model, nn.Linear(dim, len(SHAPES) + 1 + len(COLOURS) + 1 + 2)

    def naming(self, patches: Float[Tensor, "example patch dim"], scenes: Sequence[Scene]) -> Float[Tensor, ""]:
        """Mean loss of the shape, plus that of the colour, plus the squared error of where the thing's centre is."""
        shape, colour, centre = contents(scenes, round(patches.shape[1] ** 0.5))
        widths = [len(SHAPES) + 1, len(COLOURS) + 1, 2]
        shapes, colours, centres = self.names(patches).flatten(0, 1).split(widths, dim=1)
        losses = [
            nn.functional.cross_entropy(*pair) for pair in ((shapes, shape.flatten()), (colours, colour.flatten()))
        ]
        seen = shape.flatten() > 0
        return losses[0] + losses[1] + 2 * (centres[seen] - centre.flatten(0, 1)[seen]).square().mean()


def contents(
    scenes: Sequence[Scene], side: int
) -> tuple[Int[Tensor, "example patch"], Int[Tensor, "example patch"], Float[Tensor, "example patch xy=2"]]:
    """Shape, colour (from 1) and centre (-1 to 1) of what covers most of each of side * side patches.

    0 where a sixteenth of the patch or less is covered.
    """
    shapes, colours = ({name: number for number, name in enumerate(words, 1)} for words in (SHAPES, COLOURS))
    found, centre = torch.zeros(2, len(scenes), side**2, dtype=torch.long), torch.zeros(len(scenes), side**2, 2)
    for row, scene in enumerate(scenes):
        masks = torch.from_numpy(scene.masks).float()[:, None]
        most, which = nn.functional.avg_pool2d(masks, scene.pixels // side).flatten(1).max(dim=0)
        known = torch.tensor([(shapes[thing.shape], colours[thing.colour]) for thing in scene.things])
        found[:, row] = known[which].T.where(most > 1 / 16, 0)
        centre[row] = torch.tensor([(2 * thing.x - 1, 2 * thing.y - 1) for thing in scene.things])[which]
    return found[0], found[1], centre


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
    """A tokenizer that knows every word said of scenes, one token each; texts begin with <bos> and end with <eos>, or not."""
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
