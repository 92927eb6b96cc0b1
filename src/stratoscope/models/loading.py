"""`load` a model by name, Hugging Face id or folder; `wrap` one that is already in memory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stratoscope.errors import FamilyError, LoadError
from stratoscope.models import families, pretrained
from stratoscope.models.configs import refuse_unhandled
from stratoscope.models.lm import LM
from stratoscope.models.probe import probe
from stratoscope.models.prove import prove
from stratoscope.models.provenance import Revision

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"
)  # fmt: skip


def wrap(model: nn.Module, tokenizer: Any = None, *, processor: Any = None, name: str | None = None) -> LM:
    """An LM around a Hugging Face model in memory, which is left as it is.

    A known architecture is checked for config keys its family does not handle; an unknown one is probed by structure
    and proved on this very model. Raises FamilyError when it cannot be trusted.
    """
    known = families.find(model.config)
    if known is not None:
        refuse_unhandled(model.config, known)
        lm = LM(model, known, tokenizer=tokenizer, processor=processor, name=name)
        _ = lm.readout  # a classifier's is looked for now, while nothing edits the model
        return lm
    failure: FamilyError | None = None
    for family in probe(model):
        try:
            lm = LM(model, family, tokenizer=tokenizer, processor=processor, name=name)
            prove(lm, _two_prompts(model))
        except FamilyError as error:
            failure = failure or error
        else:
            return lm
    raise FamilyError(f"`{model.config.model_type}` is not a known architecture ({known_types()}), and {failure}")


def load(
    name: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    tokenizer: bool = True,
    trust_remote_code: bool = False,
) -> LM:
    """Load a model: a name of ours ("smollm2", "minilm"), a Hugging Face id, or a local folder.

    dtype: "float32", "bfloat16" or "float16". tokenizer=False allows a folder without one (then pass token ids).
    Raises LoadError, saying what to do, when the model or its tokenizer cannot be had; FamilyError when it can not be
    trusted.
    """
    import transformers

    if dtype not in ("float32", "bfloat16", "float16"):
        raise LoadError(f"dtype {dtype!r}: choose float32, bfloat16 or float16.")
    place = pretrained.resolve(str(name))
    options = {"trust_remote_code": trust_remote_code}
    with pretrained.quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(place, **options)
            model = _class_for(config).from_pretrained(place, dtype=getattr(torch, dtype), **options)
        except (OSError, ValueError) as error:
            raise pretrained.explain_hub_failure(str(name), error) from error
        reader, processor = _readers(place, options) if tokenizer else (None, None)
    if tokenizer and reader is None and processor is None:
        raise LoadError(
            f"`{name}` has no tokenizer files (tokenizer.json, tokenizer_config.json) that Transformers can read. Add "
            f"them, or load with tokenizer=False and pass token ids."
        )
    lm = wrap(model.to(device).eval(), reader, processor=processor, name=str(name))
    lm.revision = Revision(lm.model, pretrained.recorded_hash(place) or getattr(config, "_commit_hash", None))
    return lm


def known_types() -> str:
    return ", ".join(families.known())


def _class_for(config: Any) -> Any:
    """The Auto class that keeps the model's own read-out where it has one."""
    import transformers

    named = next((a for a in config.architectures or () if hasattr(transformers, a)), None)
    if named:
        return getattr(transformers, named)
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if type(config) in causal else transformers.AutoModel


def _readers(place: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """The tokenizer and, for a model that takes images, the processor; None where there is none."""
    import transformers

    tokenizer = processor = None
    holds = lambda *names: any(Path(place, name).is_file() for name in names)  # noqa: E731
    # in a folder without any tokenizer file Transformers would make up an empty one
    if not Path(place).is_dir() or holds(*_TOKENIZER_FILES):
        with suppress(OSError, ValueError, KeyError):
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
    if holds("preprocessor_config.json", "processor_config.json"):
        processor = transformers.AutoProcessor.from_pretrained(place, **options)
    return tokenizer, processor


def _two_prompts(model: nn.Module) -> list[list[int]]:
    """Two short prompts of different length, of ids spread over the vocabulary: enough to prove a family on."""
    size = model.config.get_text_config().vocab_size
    return [[(7 + 31 * i) % size for i in range(9)], [(11 + 17 * i) % size for i in range(6)]]
