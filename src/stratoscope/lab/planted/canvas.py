"""A blank small Hugging Face transformer, full of faint noise, to set heads and neurons on by hand.

The residual stream has 128 dimensions, laid out the same in both families:

| dims   | name     | holds
|
|--------|----------|---------------------------------------------------------------------------------|
| 0-23   | WORD     | which word stands here, one-hot, written by the embedding
| | 24-47  | CARRIED  | which word a head or neuron passes on, one-hot; the unembedding does not see
it | | 48-71  | ANSWER   | which word to say, one-hot; the only dims the unembedding reads (times
10)      | | 72, 73 | CONSTANT | +32 and -32 everywhere
| | 74     | FLAG     | 1 at the words a head should look for
| | 75     | ASK      | 1 at the word that asks for the answer
| | 76-95  | BALANCE  | minus the sum of all that was written, in equal parts; nothing planted reads
it | | 96-127 | POSITION | which position this is, one-hot, by GPT-2's position embedding; empty in
Llama  |

**Normalisation.** The constants are 2048 of a squared length of about 2060, and with BALANCE the
mean is zero. So RMSNorm and LayerNorm both divide by 4 wherever they stand, and their weights (4,
and 1/8 at the constants) undo it: what a component reads is, to within two percent, the stream
itself, with +1 and -1 at the constants, which then serve as biases.

**Noise.** Every weight of every other head and neuron is random: queries, keys, gates and ups with
standard deviation 0.2 (GPT-2's neurons 0.15), so that patterns and activations vary; values 0.04,
outputs and downs 0.01, so that one head moves the answer by about a hundredth. In the grouped-query
Llama a planted key/value head is shared with a query head that is noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

LAYERS, HEADS, KV_HEADS, NEURONS, HIDDEN, POSITIONS = 2, 4, 2, 32, 128, 32
WORD, CARRIED, ANSWER = range(24), range(24, 48), range(48, 72)
CONSTANT, FLAG, ASK, BALANCE, POSITION = 72, 74, 75, range(76, 96), range(96, 128)
SLOT = range(8, 32)  # the dims of a head that hold a word; in Llama, rotary pairs too slow to turn
CLOCK = range(3)  # the three fastest rotary pairs: 1, 0.32 and 0.1 radians for each position
ROPE_THETA = 1e16
STRENGTH = 32.0  # of the constants
READOUT = 10.0  # from one-hot to logit
SHARP = 9.0  # how far the score of the right key is above the others
FIRE = 8.0  # activation of a planted neuron that is on
PAD = "<pad>"

Family = Literal["gpt2", "llama"]


class Canvas:
    """A noise-filled model of one family over a list of words (at most 23; id 0 is the padding
    token).

    `loudness` scales what the noise writes. Neurons amplify what they read: their circuits need
    less of it.
    """

    def __init__(
        self,
        family: Family,
        words: Sequence[str],
        seed: int,
        loudness: float = 1.0,
        layers: int = LAYERS,
    ) -> None:
        self.family: Family = family
        self.ids = {word: index for index, word in enumerate([PAD, *words])}
        self.head_dim = HIDDEN // HEADS if family == "gpt2" else 64
        # constructors draw weights; the caller's generator stay as they are
        with torch.random.fork_rng(devices=[]):
            self.model = _blank(family, len(self.ids), layers)
        base = self.model.base_model
        self.layers = base.h if family == "gpt2" else base.layers
        self.embedding = base.get_parameter(
            "wte.weight" if family == "gpt2" else "embed_tokens.weight"
        )
        self._noise(loudness, torch.Generator().manual_seed(seed))
        self._ends()

    @torch.no_grad()
    def flag(self, words: Iterable[str], dim: int) -> None:
        """Write 1 into one dim wherever one of these words stands."""
        for word in words:
            _write(self.embedding[self.ids[word]], dim, 1.0)

    @torch.no_grad()
    def default(self, word: str) -> None:
        """Say this word (logit 10) where no component says something stronger."""
        for row in self.embedding:
            _write(row, ANSWER[self.ids[word]], 1.0)

    @torch.no_grad()
    def head(
        self,
        at: tuple[int, int],
        attend: tuple[Tensor, Tensor],
        source: Sequence[int],
        target: Sequence[int],
        strength: float = 1.0,
    ) -> None:
        """Set one head: it attends by (query, key), each [head_dim, hidden], and copies source to
        target.

        `strength` multiplies what it copies; below zero the head speaks against it.
        """
        (layer, head), (query, key) = at, attend
        value, output = self.wires(SLOT[: len(source)], source), torch.zeros(self.head_dim, HIDDEN)
        for slot, dim in zip(SLOT, target):
            _write(output[slot], dim, strength)
        here = slice(head * self.head_dim, (head + 1) * self.head_dim)
        attention = (
            self.layers[layer].attn if self.family == "gpt2" else self.layers[layer].self_attn
        )
        if self.family == "gpt2":
            for block, weight in zip(
                attention.c_attn.weight.split(HIDDEN, dim=1), (query, key, value)
            ):
                block[:, here] = weight.T
            attention.c_proj.weight[here] = output
            return
        kv = head // (HEADS // KV_HEADS)
        shared = slice(kv * self.head_dim, (kv + 1) * self.head_dim)
        attention.q_proj.weight[here] = query
        attention.k_proj.weight[shared] = key
        attention.v_proj.weight[shared] = value
        attention.o_proj.weight[:, here] = output.T

    @torch.no_grad()
    def neuron(self, layer: int, neuron: int, reads: int, writes: Mapping[int, float]) -> None:
        """Set one neuron: activation 8 where dim `reads` is 1, 0 where that is 0; on, it adds
        `writes`."""
        mlp = self.layers[layer].mlp
        row, column = torch.zeros(HIDDEN), torch.zeros(HIDDEN)
        row[reads], row[CONSTANT] = 2 * FIRE, -FIRE
        for dim, amount in writes.items():
            _write(column, dim, amount / FIRE)
        if self.family == "gpt2":
            mlp.c_fc.weight[:, neuron], mlp.c_proj.weight[neuron] = row, column
            return
        mlp.gate_proj.weight[neuron], mlp.down_proj.weight[:, neuron] = row, column
        mlp.up_proj.weight[neuron] = 0.0
        mlp.up_proj.weight[neuron, CONSTANT] = 1.0

    def wires(self, into: Sequence[int], source: Sequence[int], gain: float = 1.0) -> Tensor:
        """[head_dim, hidden]: dim source[i] of the residual stream is laid onto dim into[i] of the
        head."""
        weight = torch.zeros(self.head_dim, HIDDEN)
        weight[list(into), list(source)] = gain
        return weight

    def match(self, query: Sequence[int], key: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Query and key weights of a head that looks for keys whose `key` dims equal its own
        `query` dims."""
        gain = math.sqrt(SHARP * math.sqrt(self.head_dim))
        slots = SLOT[: len(query)]
        return self.wires(slots, query, gain), self.wires(slots, key, gain)

    def score(
        self, *terms: tuple[float, Mapping[int, float], Mapping[int, float]]
    ) -> tuple[Tensor, Tensor]:
        """Query and key weights of a head whose score is a sum of terms, one for each dim of the
        head.

        A term (amount, query, key) adds amount * (what the query's stream holds at dims `query`,
        each times its weight, summed) * (the same of the key's). GPT-2 only: in Llama the first
        dims of a head turn.
        """
        if self.family != "gpt2" or len(terms) > self.head_dim:
            raise ValueError(
                f"{len(terms)} terms on a {self.family} head of {self.head_dim} dims: GPT-2 holds "
                "32."
            )
        query, key = torch.zeros(self.head_dim, HIDDEN), torch.zeros(self.head_dim, HIDDEN)
        for dim, (amount, asks, has) in enumerate(terms):
            size = math.sqrt(abs(amount) * math.sqrt(self.head_dim))
            for rows, weights, sign in ((query, asks, 1.0), (key, has, math.copysign(1.0, amount))):
                for source, weight in weights.items():
                    rows[dim, source] = sign * size * weight
        return query, key

    def look_back(self) -> tuple[Tensor, Tensor]:
        """Query and key weights of a head that looks one position back (position 0 has only
        itself).

        GPT-2: position p asks for the one-hot of p - 1. Llama: query and key are the same constant
        on three rotary pairs, the query turned back by one position. The score is a sum of cos(f *
        (distance - 1)) over their frequencies: highest at distance 1, lower by SHARP at its
        neighbours, and by more beyond.
        """
        if self.family == "gpt2":
            gain = math.sqrt(SHARP * math.sqrt(self.head_dim))
            return self.wires(range(31), POSITION[1:], gain), self.wires(range(32), POSITION, gain)
        half = self.head_dim // 2
        frequency = [ROPE_THETA ** (-pair / half) for pair in CLOCK]
        gain = math.sqrt(SHARP * math.sqrt(self.head_dim) / sum(1 - math.cos(f) for f in frequency))
        query, key = torch.zeros(self.head_dim, HIDDEN), torch.zeros(self.head_dim, HIDDEN)
        for pair, f in zip(CLOCK, frequency):
            query[pair, CONSTANT], query[pair + half, CONSTANT] = (
                gain * math.cos(f),
                -gain * math.sin(f),
            )
            key[pair, CONSTANT] = gain
        return query, key

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token for each word between spaces; an unknown word is an error, not a guess."""
        words = Tokenizer(WordLevel(self.ids))
        words.pre_tokenizer = WhitespaceSplit()
        # token_type_ids are left out: GPT-2 would add their embedding to the residual stream
        return PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token=PAD, model_input_names=["input_ids", "attention_mask"]
        )

    @torch.no_grad()
    def _noise(self, loudness: float, generator: torch.Generator) -> None:
        read, value, write = 0.2, 0.04 * loudness, 0.01 * loudness
        scale = {"c_attn": read, "q_proj": read, "k_proj": read, "v_proj": value}
        scale |= {"c_fc": 0.75 * read, "gate_proj": read, "up_proj": read}
        for name, weight in self.model.named_parameters():
            weight.normal_(0, scale.get(name.split(".")[-2], write), generator=generator)
            if name.endswith("bias"):
                weight.zero_()
            elif name.endswith("c_attn.weight"):
                weight[:, 2 * HIDDEN :] *= value / read

    @torch.no_grad()
    def _ends(self) -> None:
        """Embedding, normalisation and unembedding: the parts that carry no noise."""
        unembedding = self.model.lm_head.weight.zero_()
        self.embedding.zero_()
        for index in self.ids.values():
            _write(self.embedding[index], WORD[index], 1.0)
            unembedding[index, ANSWER[index]] = READOUT
        self.embedding[:, CONSTANT], self.embedding[:, CONSTANT + 1] = STRENGTH, -STRENGTH
        if self.family == "gpt2":
            positions = self.model.transformer.wpe.weight.zero_()
            for row, dim in zip(positions, POSITION):
                _write(row, dim, 1.0)
        size = math.sqrt(2 * STRENGTH**2 / HIDDEN)
        for module in self.model.modules():
            if type(module).__name__ in {"LayerNorm", "LlamaRMSNorm"}:
                module.weight.fill_(size)
                module.weight[CONSTANT : CONSTANT + 2] = size / STRENGTH


def _write(row: Tensor, dim: int, amount: float) -> None:
    """Add an amount to one dim of a [hidden] row, and take it off BALANCE: the sum of the row
    stays."""
    row[dim] += amount
    row[BALANCE.start : BALANCE.stop] -= amount / len(BALANCE)


def _blank(family: Family, vocabulary: int, layers: int) -> PreTrainedModel:
    """An ordinary Hugging Face model of the right shape, its weights still to be set."""
    tokens = {
        "vocab_size": vocabulary,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if family == "gpt2":
        config = GPT2Config(
            **tokens,
            tie_word_embeddings=False,
            n_layer=layers,
            n_head=HEADS,
            n_embd=HIDDEN,
            n_inner=NEURONS,
            n_positions=POSITIONS,
        )
        return GPT2LMHeadModel(config).float().eval()
    config = LlamaConfig(
        **tokens,
        tie_word_embeddings=False,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=64,
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    )
    return LlamaForCausalLM(config).float().eval()
