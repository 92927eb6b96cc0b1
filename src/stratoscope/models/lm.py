"""LM: the Hugging Face model you have, its tokenizer, and the names of what is inside. The model is
never rewritten."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from stratoscope.errors import InputError, SiteError
from stratoscope.models import batch as batches
from stratoscope.models import finite, sequence, signal, source
from stratoscope.models.batch import Batch
from stratoscope.models.dims import Dims
from stratoscope.models.family import Family
from stratoscope.models.find_readout import find, mask_token
from stratoscope.models.layout import Layout
from stratoscope.models.provenance import Revision, changes
from stratoscope.models.readout import Readout
from stratoscope.models.sites import Site
from stratoscope.models.taps import StopForward, refuse_compiled, taps_of
from stratoscope.models.weights import matrix
from stratoscope.store.named import NAMED


class LM:
    """A wrapped model. Call it on prompts to run it; use `engine.trace` and `engine.intervene` to
    look inside.

    model, tokenizer, processor: the Hugging Face objects, untouched. family, layout: where each
    site lives. dims: sizes of the main tower (`layout.dims["vision"]` and the like for others).
    taps: who is listening.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        *,
        tokenizer: Any = None,
        processor: Any = None,
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.processor, self.family = (
            model,
            tokenizer,
            processor,
            family,
        )
        refuse_compiled(model)
        self.layout = Layout(model, family)
        self.taps = taps_of(model, self.layout)
        self._name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.revision = Revision(model, revision)
        self._readout: Readout | None = None

    def __repr__(self) -> str:
        d = self.dims
        return (
            f"LM({self._name!r}, {self.family.name}: {d.layers} layers, {d.heads} heads, dim "
            f"{d.dim})"
        )

    @property
    def dims(self) -> Dims:
        """Sizes of the main tower. The vocabulary's is read anew: it can be resized."""
        dims, vocab = self.layout.dims[""], getattr(self.layout.config(), "vocab_size", 0) or 0
        return dims if vocab == dims.vocab else replace(dims, vocab=vocab)

    def batch(self, inputs: Any, *, target: Any = None) -> Batch:
        """Read prompts (one or several), ids, a mapping of model inputs, or a Batch; padding side
        does not matter.

        target: of an encoder-decoder, what its decoder has said so far (a text for each prompt, or
        ids); by default nothing but its start token. Raises InputError for an empty prompt, one
        longer than the context, an unknown token id, or text without tokenizer.
        """
        tower = self.family.source
        if target is not None and (isinstance(inputs, Batch) or not tower):
            raise InputError(
                "a target is what the decoder of an encoder-decoder has said so far: this "
                + ("batch has its own." if tower else "model has no encoder, so write one prompt.")
            )
        if isinstance(inputs, Batch):
            if tower and inputs.source is None:  # rows that a method made of the decoder's tokens
                source.refuse(self, "tokens alone, with nothing for it to read, are no input of it")
            return inputs.to(self.model.device)
        if not tower:
            return self._read(inputs).to(self.model.device)
        inputs, begun = source.apart(inputs, target)
        heard = replace(self._read(inputs, predicts=False, tower=tower), tower=tower)
        target_ids = source.target_ids(self, target, len(heard)) if begun is None else begun
        made = replace(self._read(target_ids, predicts=False), source=heard)
        if len(made) != len(heard):
            raise InputError(f"{len(heard)} inputs and {len(made)} targets: give one for each.")
        return made.to(self.model.device)

    def _read(self, inputs: Any, *, predicts: bool = True, tower: str = "") -> Batch:
        if self.family.takes_signal(tower):
            made = signal.read(self, inputs, tower)
            return made if tower else sequence.named(self.model, made)
        config = self.model.config
        # the config's first: it is the one by which classifiers find where a prompt ends
        pads = (
            getattr(held, "pad_token_id", None) for held in (self.layout.config(), self.tokenizer)
        )
        pad = next((pad for pad in pads if pad is not None), 0)
        names = ("image_token_id", "image_token_index", "audio_token_id")
        image = next((n for name in names if (n := getattr(config, name, None))), None)
        vocab = self.dims.vocab or None
        # never read, but looked up in the embedding all the same
        pad = pad if 0 <= pad < (vocab or pad + 1) else 0
        main = self.family.towers[""]
        made = batches.make(
            sequence.as_tokens(self.family, inputs),
            self.tokenizer,
            limit=self.context,
            pad=pad,
            image=image,
            vocab=vocab,
            predicts=predicts and main.causal and bool(self.layout.head),
        )
        if made.ids is not None and self.family.per_token:
            given = {
                name: torch.full_like(made.ids, value)
                for name, value in self.family.per_token.items()
            }
            made = replace(made, extra=given | dict(made.extra))
        named = self.layout.family_head and self.family.pooled is None
        searched = self._readout is not None and self._readout.mask is not None
        if made.tokens and not main.causal and (named or searched):
            made = replace(made, notes=(*made.notes, *_read_at(made, mask_token(self))))
        return sequence.named(self.model, made)

    def __call__(self, inputs: Any, **arguments: Any) -> Any:
        """One forward pass of the Hugging Face model, without a cache; None when a trace stopped it
        early."""
        batch = self.batch(inputs)
        if self.model.can_generate():
            arguments.setdefault("use_cache", False)
        with self.taps.running(batch, copies=batch.copies):
            try:
                return self.model(**sequence.arguments(self.family, batch), **arguments)
            except StopForward:
                return None

    def sites(self, pattern: str | Site | None = None) -> list[Site]:
        """The sites a pattern names (`layers.*.attn.z`), or every site of this model. Raises
        SiteError."""
        return self.layout.all_sites() if pattern is None else self.layout.resolve(pattern)

    def weight(self, site: str | Site) -> Tensor:
        """The matrix (out, in) that writes `attn.out`, `cross.out`, `mix.out` or `mlp.out`, reads
        into `mlp.pre`, or is `embed` or `logits`.

        attn.out: (dim, head * head_dim); mlp.out: (dim, neuron); mix.out of a state space: (dim,
        channel); embed and logits: (vocab, dim).
        Raises InputError where it holds what is not a number.
        """
        at = self.layout.resolve_one(site)
        matrix = self._weight(at)
        finite.refuse({f"the weight of {at}": matrix.detach()})
        return matrix

    def _weight(self, at: Site) -> Tensor:
        if at.point in ("attn.out", "cross.out", "mix.out", "mlp.out"):
            return matrix(self.layout.writers(at)[0])
        if at.point == "logits":
            return matrix(self.layout.head[-1])
        module, point = self.layout.locate(at)
        if at.point not in ("embed", "mlp.pre") or not hasattr(module, "weight"):
            raise SiteError(
                f"`{at}` has no one weight; ask for attn.out, mlp.out, mlp.pre, embed or logits."
            )
        return (
            matrix(module)
            if point.part is None
            else matrix(module).chunk(point.part[1])[point.part[0]]
        )

    @property
    def readout(self) -> Readout:
        """What the model makes of its last residual stream, and at which position: see
        `models.readout`.

        Called on (..., dim) residuals it gives (..., vocab) logits, as the model does.
        """
        if self.layout.family_head:
            return find(self)  # made anew: the user may have given the model another head
        if self._readout is None:
            self._readout = self.layout.found_head = find(self)
        return self._readout

    @property
    def provenance(self) -> dict[str, Any]:
        """What a result must carry to be repeated: model, weights (their name, anew where they have
        changed), dtype, attention kernel, device, versions; and `changes`, where edits,
        interventions or others' hooks are at work.
        """
        changed = changes(self.taps)
        edits = tuple(number for number, declared in self.taps.declared if "weights" in declared)
        return {
            "model": self._name,
            **({"title": known.title} if (known := NAMED.get(self._name)) and known.title else {}),
            "family": self.family.name,
            "weights": self.revision.name(edits),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "kernel": self.layout.config()._attn_implementation,
            "device": str(self.model.device),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            **({"changes": changed} if changed else {}),
        }

    @property
    def context(self) -> int | None:
        """The longest prompt in tokens, or None where the config names no limit."""
        config = self.layout.config()
        names = ("max_position_embeddings", "max_target_positions")
        limit = next((n for name in names if (n := getattr(config, name, None))), None)
        return int(limit) - self.family.reserved_positions if limit else None


def _read_at(batch: Batch, mask: int | None) -> list[str]:
    """What is asked of a masked language model is not what follows a text: say where it is read,
    unless every prompt holds one mask token."""
    marked = [0] * len(batch) if mask is None else (batch.text[0] == mask).sum(dim=1).tolist()
    others = [row for row, count in zip(batch.tokens, marked) if count != 1]
    if not others:
        return []
    tokens = ", ".join(dict.fromkeys(repr(row[-1]) for row in others))
    which = "each prompt" if len(others) == len(batch) else "each prompt without a mask token"
    note = (
        f"This model fills in masked tokens; its prediction is read at the last token of {which} "
        f"({tokens:.60})."
    )
    if (most := max(marked)) > 1:
        return [
            f"{note} A prompt holds {most} mask tokens: leave the one that is asked for, and write "
            "words in the place of the others."
        ]
    return [note if mask is None else f"{note} Put the mask token where a word is asked for."]
