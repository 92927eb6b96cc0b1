"""What comes beside the tokens of a batch (pictures, token types, embeddings), of one example."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Bool, Int
from torch import Tensor

from stratoscope.errors import InputError

_GRID = "image_grid_thw"  # (image, 3) patches of each picture; then pixel_values are (patch, dim)


def of_example(
    extra: Mapping[str, Tensor],
    image: Bool[Tensor, "example position"] | None,
    index: int,
    *,
    shape: tuple[int, ...],
    length: int,
) -> dict[str, Tensor]:
    """The part of `extra` that belongs to example `index`.

    image: which tokens stand for pictures. shape: (example,) or (example, position) of the batch.
    length: tokens of this example. Raises InputError where whose picture is whose is not known.
    """
    if _GRID in extra and image is not None:
        return _by_grid(extra, image, index, shape=shape, length=length)
    inputs_of = {}
    count, *width = shape
    for name, x in extra.items():
        # as many pictures as examples, and none without one: then each has its own
        own = len(x) == count if x.ndim else False
        if not own or (
            name.startswith(("pixel", "input_feat"))
            and image is not None
            and not bool(image.any(1).all())
        ):
            raise InputError(
                f"`{name}` of shape {tuple(x.shape)} beside {count} prompts: a batch with "
                "images cannot be split into examples unless each has one picture: pass them one "
                "by one."
            )
        by_token = x.ndim > 1 and [x.shape[1]] == width
        inputs_of[name] = x[index : index + 1, :length] if by_token else x[index : index + 1]
    return inputs_of


def _by_grid(
    extra: Mapping[str, Tensor],
    image: Tensor,
    index: int,
    *,
    shape: tuple[int, ...],
    length: int,
) -> dict[str, Tensor]:
    """Pictures of any size, one after another, each as many tokens as its patches make."""
    patches = extra[_GRID].prod(dim=1)
    first, last = _between(patches, image.sum(dim=1), index)
    start, end = int(patches[:first].sum()), int(patches[:last].sum())
    rest = {name: x for name, x in extra.items() if name not in (_GRID, "pixel_values")}
    own = {_GRID: extra[_GRID][first:last], "pixel_values": extra["pixel_values"][start:end]}
    other = of_example(rest, None, index, shape=shape, length=length)
    return other | (own if end > start else {})


def _between(
    patches: Int[Tensor, " image"], tokens: Int[Tensor, " example"], index: int
) -> tuple[int, int]:
    """The pictures of an example: those whose patches lie between the tokens before and after."""
    ends = [0, *(patches.cumsum(0) * tokens.sum()).tolist()]  # in tokens times all patches
    total = int(patches.sum())
    before = total * int(tokens[:index].sum())
    after = before + total * int(tokens[index])
    if before not in ends or after not in ends:
        raise InputError(
            f"{len(patches)} pictures and {tokens.tolist()} image tokens in the prompts: a batch "
            "with images cannot be split into examples when they do not match: pass them one by "
            "one."
        )
    return ends.index(before), ends.index(after)
