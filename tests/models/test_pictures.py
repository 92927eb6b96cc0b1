"""One example of a batch with pictures, token types or embeddings is what it would be alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stratoscope.errors import InputError
from support import tiny

IMAGE, NOISE = [tiny.IMAGE] * 4, torch.Generator().manual_seed(1)
PIXELS, PATCHES = (torch.randn(size, generator=NOISE) for size in ((3, 3, 16, 16), (96, 96)))
TEXTS = [[1, *IMAGE, 3, 4, 5, 6, 7], [1, *IMAGE, 9], [1, 8, *IMAGE, 9, 10]]


def rows(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, texts))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in texts])
    mask = torch.tensor([[n < len(row) for n in range(width)] for row in texts])
    return {"input_ids": ids, "attention_mask": mask.long()}


def several(name: str) -> dict[str, torch.Tensor]:
    """Three prompts of different length with pictures of their own, or types, or embeddings."""
    if name == "vit":
        return {"pixel_values": PIXELS}
    if name == "qwen2_5_vl":  # two pictures, then one larger, then none
        one, large = [92, *[tiny.IMAGE] * 4, 93], [92, *[tiny.IMAGE] * 16, 93]
        texts = [[1, *one, 5, *one, 7], [1, *large, 9], [1, 8, 9, 10]]
        return rows(texts) | {
            "pixel_values": PATCHES,
            "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4], [1, 8, 8]]),
        }
    if name == "bert":
        made = rows([[3, 4, 5, 6], [7, 8], [9, 10, 11]])
        return made | {"token_type_ids": torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0], [1, 0, 1, 0]])}
    if name == "llama":
        given = rows([[3, 4, 5, 6], [7, 8], [9, 10, 11]])
        embeds = tiny.lm("llama").model.get_input_embeddings()(given["input_ids"]).detach()
        return {"inputs_embeds": embeds, "attention_mask": given["attention_mask"]}
    pixels = PIXELS if name == "llava" else PIXELS[:, None]
    return rows(TEXTS) | {"pixel_values": pixels}


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["llava", "idefics3", "smolvlm", "qwen2_5_vl", "vit", "bert", "llama"]
)
def test_alone_and_together_are_the_same(name: str) -> None:
    lm = tiny.lm(name)
    batch = lm.batch(several(name))
    together = [lm(batch)["logits"][number] for number in range(len(batch))]
    for number, logits in enumerate(together):
        one = batch.example(number)
        assert len(one) == 1
        assert not one.padded
        alone: Any = lm(one)["logits"][0]
        assert tiny.gap(alone, logits[: len(alone)] if logits.ndim > 1 else logits) < 1e-5
    assert not torch.equal(together[0], together[1])


def test_pictures_that_nobody_owns_are_refused() -> None:
    lm = tiny.lm("llava")
    two_in_one = rows([[1, *IMAGE, *IMAGE, 3], [1, 4]]) | {"pixel_values": PIXELS[:2]}
    with pytest.raises(InputError, match="one by one"):
        lm.batch(two_in_one).example(0)
    odd = several("qwen2_5_vl")
    odd["image_grid_thw"] = odd["image_grid_thw"][[2, 0, 1]]
    with pytest.raises(InputError, match="do not match"):
        tiny.lm("qwen2_5_vl").batch(odd).example(0)
