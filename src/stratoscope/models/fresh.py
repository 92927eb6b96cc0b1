"""Fresh weights: the same model as it was before training, the control that any claim about what
training made needs."""

from __future__ import annotations

import copy
from typing import Any

import torch

from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.loading import wrap


@torch.no_grad()
def untrained(lm: LM, *, seed: int = 0) -> LM:
    """The model's untrained twin, with the same tokenizer: `lm`'s class, config, family, dtype and
    device, and the weights that Transformers starts training from (the class's own
    `_init_weights`). `lm` is left as it is.

    seed: of the weights, which are drawn on the CPU and depend on nothing else; torch's random
    state is the same afterwards. What was tied in `lm` is tied. Raises InputError for a model that
    is not what its config makes: adapted, quantised or rebuilt.
    """
    model: Any = lm.model
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        try:
            fresh = type(model)(copy.deepcopy(model.config)).eval()
        except TypeError as error:
            raise InputError(
                f"{type(model).__name__} is not made of a config alone ({error}), so its untrained "
                "twin cannot be made. Build the model anew and `wrap` it."
            ) from error
    _refuse_other_parameters(model, fresh)
    fresh.to(model.device)
    for new, old in zip(fresh.parameters(), model.parameters()):
        new.data = new.data.to(old)
    name = f"{lm.provenance['model']} (untrained, seed {seed})"
    return wrap(fresh, lm.tokenizer, processor=lm.processor, name=name, family=lm.family)


def _refuse_other_parameters(model: Any, fresh: Any) -> None:
    """Raise InputError, naming one, where two models have not the same parameters; a tied one
    counts once."""
    has, gets = (
        {name: tuple(p.shape) for name, p in one.named_parameters()} for one in (model, fresh)
    )
    if other := sorted(has.items() ^ gets.items()):
        name = other[0][0]
        raise InputError(
            f"`{name}` is {has.get(name, 'missing')} in this model and {gets.get(name, 'missing')} "
            f"in what its config makes ({len(other)} such differences): it was adapted, quantised "
            "or rebuilt. Take the untrained twin of the plain model, before that."
        )
