"""The smallest inputs that reach every part of a model: what a family and a read-out are proved
on."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from stratoscope.errors import StratoscopeError
from stratoscope.models.sites import Site

if TYPE_CHECKING:
    from stratoscope.models.lm import LM


def specimens(lm: LM) -> list[Any]:
    """What a family is proved on: inputs for its text, and for its pictures, as small as they come.

    Of the two prompts the shorter begins the longer: what it has alone, beside it and within it
    tells what is causal and where padding goes. Pictures are left out where no inputs can be made
    from the config: then only the text is proved.
    """
    if lm.family.takes_signal():
        return [specimen(lm)]
    if not lm.family.reads_ids:
        return [specimen(lm)] if _runs(lm, specimen(lm)) else []
    if lm.family.source:
        return [specimen(lm)]
    long, _ = prompts(lm)
    text = [long, long[:2]] if len(long) > 2 and lm.family.towers[""].mask else [long]
    eye, ear = _taking(lm, "pixel_values"), _taking(lm, "input_features")
    if ear is not None:
        return [text, *_with_sound(lm, long, ear)]
    if eye is None:
        return [text]
    if not lm.family.projector:  # a text tower and a vision tower side by side, which run together
        long_picture = {"input_ids": torch.tensor([long])} | picture(
            lm.model, lm.layout.config(eye)
        )
        return [long_picture] if _runs(lm, long_picture) else []
    alone = [text] if _runs(lm, text) else []  # some answer no prompt without a picture
    return [*alone, *_with_picture(lm, long, eye)]


def _taking(lm: LM, argument: str) -> str | None:
    """The tower beside the text that takes this (pictures, a spectrogram), or None."""
    towers = lm.family.towers.items()
    return next((name for name, tower in towers if name and tower.takes == argument), None)


def specimen(lm: LM) -> Any:
    """Two short prompts that have nothing in common, of different length; or one small picture of
    noise."""
    if lm.family.takes_signal():
        return _series(lm)
    if not lm.family.reads_ids:
        return picture(lm.model, lm.layout.config())
    return _heard(lm) if lm.family.source else prompts(lm)


def _series(lm: LM) -> Any:
    """Two series that make a few positions each, of different length where that may be."""
    config, table = lm.layout.config(), lm.family.towers[""]
    if not table.lengths:
        shape = 2, config.context_length, getattr(config, table.rows)
        return {table.takes: _wave(lm.model, 1, shape[0] * shape[1] * shape[2]).reshape(shape)}
    steps, many = 1, getattr(lm.model, table.lengths)
    while int(many(torch.tensor([steps]))) < 5:
        steps *= 2
    long, other = _wave(lm.model, 2, steps)
    one_length = table.alone or not table.mask
    return [long, other if one_length else other[: 2 * steps // 3]]


def _heard(lm: LM) -> Any:
    """An encoder-decoder's: two targets of which one begins the other, beside the same source, and
    the shortest beside a shorter one; sound is of one length, and two are enough."""
    long, other = prompts(lm)
    targets = [long, long[:2], other[:1]]
    takes = lm.family.towers[lm.family.source].takes
    if takes == "input_ids":
        return lm.batch([other, other, long[:2]], target=targets)
    config = lm.layout.config(lm.family.source)
    steps = 2 * config.max_source_positions
    sound = _wave(lm.model, 1, config.num_mel_bins * steps)
    sounds = sound.reshape(1, config.num_mel_bins, steps).expand(2, -1, -1)
    return lm.batch({takes: sounds}, target=targets[:2])


def _with_picture(lm: LM, text: list[int], eye: str) -> list[dict[str, Any]]:
    """One prompt with one picture, as this model takes it, or nothing: a prompt with one image
    token tells by what leaves the projector how many it needs."""
    config = lm.model.config
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if token is None:
        return []
    for picture in _pictures(lm, eye):
        for count in (1, _projected(lm, picture | {"input_ids": torch.tensor([[*text, token]])})):
            given = picture | {"input_ids": torch.tensor([[*text, *[token] * count, *text[:2]]])}
            if count and _runs(lm, given):
                return [given]
    return []


def _with_sound(lm: LM, text: list[int], ear: str) -> list[dict[str, Any]]:
    """One prompt with one sound, all but its beginning hidden, or nothing."""
    config, token = lm.layout.config(ear), getattr(lm.model.config, "audio_token_id", None)
    steps = 2 * config.max_source_positions
    shape = (1, config.num_mel_bins, steps)
    sound = {"input_features": _wave(lm.model, 1, config.num_mel_bins * steps).reshape(shape)}
    every = torch.ones(1, steps, dtype=torch.long, device=lm.model.device)
    if token is None:
        return []
    ids = torch.tensor([[*text, *[token] * (steps // 4)]])  # as many as Qwen2-Audio makes
    positions = _projected(lm, sound | {"input_ids": ids, "feature_attention_mask": every})
    if not positions:
        return []
    each = steps // positions  # steps of a position
    heard = every * (torch.arange(steps, device=every.device) < 4 * each)
    ids = torch.tensor([[*text, *[token] * 4, *text[:2]]])
    given = sound | {"feature_attention_mask": heard, "input_ids": ids}
    return [given] if _runs(lm, given) else []


def _pictures(lm: LM, eye: str) -> list[dict[str, Any]]:
    vision = lm.layout.config(eye)
    # patches in a row
    if getattr(vision, "spatial_merge_size", None) and hasattr(vision, "temporal_patch_size"):
        side = 2 * vision.spatial_merge_size
        channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        return [
            {
                "pixel_values": _wave(lm.model, side * side, width),
                "image_grid_thw": torch.tensor([[1, side, side]]),
            }
        ]
    pixels = noise(lm.model, vision)
    return [{"pixel_values": pixels}, {"pixel_values": pixels[:, None]}]


def _projected(lm: LM, given: dict[str, Any]) -> int:
    """How many image tokens leave the projector, also where the model then stops because it was
    given too few."""
    rows: list[int] = []
    with lm.taps.using(
        reads={Site("", None, "projector"): [lambda x, run: rows.append(x[..., 0].numel())]}
    ):
        _runs(lm, given)
    return rows[-1] if rows else 0


def _runs(lm: LM, given: Any) -> bool:
    """Whether the model takes such inputs at all."""
    try:
        with torch.no_grad(), lm.taps.using():
            lm(given)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, StratoscopeError):
        return False
    return True


def prompts(lm: LM) -> list[list[int]]:
    """Two short prompts of different length, of ids spread over the vocabulary, without the special
    ones."""
    model, text = lm.model, lm.model.config.get_text_config()
    special = {
        value
        for config in (text, model.config)
        for name, value in vars(config).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    size = min(text.vocab_size, lm.dims.vocab or text.vocab_size)
    spread = [(7 + 31 * i) % size for i in range(4 * len(special) + 40)]
    free = [i for i in dict.fromkeys(spread) if i not in special] or spread
    free = (free * 7)[:7]  # a vocabulary of a few tokens
    # a model that takes no mask takes one length
    limit = min(lm.context or 7, 7 if lm.family.towers[""].mask else 3)
    return [free[:4][:limit], free[4:][:limit]]


def picture(model: Any, config: Any) -> dict[str, torch.Tensor]:
    """One picture of noise, as a vision encoder takes it: pixels, or patches with the shape that
    they make (SigLIP 2)."""
    if "spatial_shapes" not in inspect.signature(model.forward).parameters:
        return {"pixel_values": noise(model, config)}
    patches = _wave(model, 4, config.num_channels * config.patch_size**2)[None]
    one = torch.ones(1, 4, dtype=torch.long, device=patches.device)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": one,
        "spatial_shapes": torch.tensor([[2, 2]]),
    }


def noise(model: Any, config: Any) -> torch.Tensor:
    """(1, channel, height, width) pixels of the size that a vision config names."""
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    return _wave(model, channels, height * width).reshape(1, channels, height, width)


def _wave(model: Any, rows: int, width: int) -> torch.Tensor:
    """(rows, width) numbers without a pattern, made without the random generator, which belongs to
    the user."""
    steps = torch.arange(1, rows * width + 1, dtype=torch.float32)
    return torch.sin(steps * steps).reshape(rows, width).to(model.device, model.dtype)
