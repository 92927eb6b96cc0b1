"""`load` a model by name, Hugging Face id or folder; `wrap` one that is already in memory."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from stratoscope.errors import FamilyError, LoadError, StratoscopeError
from stratoscope.models import families, own
from stratoscope.models.configs import refuse_unhandled
from stratoscope.models.family import Family
from stratoscope.models.lm import LM
from stratoscope.models.probe import probe
from stratoscope.models.prove import prove
from stratoscope.models.provenance import Revision
from stratoscope.models.ready import chosen_device, ready
from stratoscope.models.specimen import specimens
from stratoscope.models.taps import refuse_compiled
from stratoscope.store import hub, pretrained

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "spiece.model",
)  # fmt: skip


def wrap(
    model: Any,
    tokenizer: Any = None,
    *,
    processor: Any = None,
    name: str | None = None,
    family: Family | None = None,
) -> LM:
    """An LM around a Hugging Face model in memory, which is left as it is.

    The family is proved on this very model, with prompts of a few tokens: `family`, a table of your
    own (docs/families.md), or `FAMILY` on the model's class, or that of a known architecture after
    its config keys are checked, or one that is found in the structure of an unknown one. Whether
    earlier positions see later ones is measured, whatever the architecture does by default. A model
    inside DataParallel or `torch.compile`'s wrapper is taken out of it. Raises FamilyError when the
    model cannot be trusted, or its weights are not there, InputError when a part of it is compiled
    in place.
    """
    model = ready(model)
    refuse_compiled(model)
    given = family or own.family_of(model)
    known = given or families.find(model.config)
    if known is None:
        candidates = probe(model)
    elif given is not None:
        candidates = [given]
    else:
        refuse_unhandled(model.config, known)
        candidates = [known, _turned_round(known)]
    failure: FamilyError | None = None
    for table in candidates:
        try:
            lm = LM(model, table, tokenizer=tokenizer, processor=processor, name=name)
            for inputs in specimens(lm):
                prove(lm, inputs)
        except FamilyError as error:
            failure = failure or error
        except (
            RuntimeError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            StratoscopeError,
        ) as error:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            failure = failure or FamilyError(
                f"{type(model).__name__} does not run as family `{table.name}` has it ({reason}); "
                "refused."
            )
        else:
            return lm
    if known is not None and failure is not None:
        raise failure
    raise FamilyError(
        f"`{model.config.model_type}` is not a known architecture ({known_types()}), and {failure}"
    )


def _turned_round(family: Family) -> Family:
    """The family with a main stack that is causal where it was bidirectional, or the other way
    round: `is_causal=False` in a config does that to any decoder."""
    main = family.towers[""]
    return replace(family, towers={**family.towers, "": main.but(causal=not main.causal)})


def load(
    name: str | Path,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    tokenizer: bool = True,
    trust_remote_code: bool = False,
    family: Family | None = None,
) -> LM:
    """Load a model: a name of ours ("smollm2", "minilm"), a Hugging Face id, or a local folder.

    dtype: "float32", "bfloat16", "float16", or "auto" for that of the file. device: as torch names
    it, or "auto": the GPU where there is one, else the CPU. By default it is the CPU, where tensors
    that you make yourself are; the command line takes "auto". tokenizer=False allows a folder
    without one (then pass token ids). family: a table of your own, as for `wrap`. Raises LoadError,
    saying what to do, when the model or its tokenizer cannot be had; FamilyError when it can not be
    trusted.
    """
    import transformers

    if dtype not in ("float32", "bfloat16", "float16", "auto"):
        raise LoadError(
            f"dtype {dtype!r}: choose float32, bfloat16, float16, or auto for that of the file."
        )
    there = chosen_device(device)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    place = pretrained.resolve(str(name))
    options = {"trust_remote_code": trust_remote_code}
    with hub.quiet():
        try:
            ours = own.module_of(place)
            config = transformers.AutoConfig.from_pretrained(place, **options)
            model = _class_for(config, ours).from_pretrained(place, dtype=kind, **options)
        except (OSError, ValueError) as error:
            raise hub.explain_failure(str(name), error) from error
        reader, processor = _readers(place, options) if tokenizer else (None, None)
    reads_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    if tokenizer and reads_text and reader is None and processor is None:
        raise LoadError(
            f"`{name}` has no tokenizer files (tokenizer.json, tokenizer_config.json) that "
            "Transformers can read. Add "
            f"them, or load with tokenizer=False and pass token ids."
        )
    lm = wrap(model.to(there).eval(), reader, processor=processor, name=str(name), family=family)
    lm.revision = Revision(
        lm.model, pretrained.recorded_hash(place) or getattr(config, "_commit_hash", None)
    )
    return lm


def known_types() -> str:
    return ", ".join(families.known())


def _class_for(config: Any, ours: ModuleType | None = None) -> Any:
    """The class that keeps the model's own read-out where it has one. ours: the file that defines
    it, where it is not Transformers'."""
    import transformers

    home = ours or transformers
    named = next((a for a in config.architectures or () if hasattr(home, a)), None)
    if named:
        return getattr(home, named)
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
