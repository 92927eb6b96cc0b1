"""CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired Adaptive Sparse
Activation.

Wang, Fan, Wang, Chen and Chen, 2024. arXiv:2410.18311.
Claim: the few neurons that a prompt uses most can be fixed once it is read, and the model goes on
    with these alone at little cost and much faster.
Methods: editing.core_neurons
Protocol: OPT-6.7B to 30B and Llama 2 and 3; token_share 0.2, 40 % of neurons (theirs differ from
    task to task), layers 6 on; accuracy on question answering, translation and summaries; tokens a
    second against the plain model, DejaVu and PowerInfer.
What would change our mind: on a model whose loss suffers from random neurons, a prompt's own core
    that loses a tenth of a nat less than the neurons most frequent in texts of the same kind, and
    tokens that come a fifth sooner.
What the authors may object: their models have 6.7 billion parameters and more, of which OPT has
    ReLU, whose silent neurons cost nothing to leave out; gated neurons are signed, and their count
    of the positive ones leaves half of them out of sight; they judge by answers, not by loss; our
    static core comes of the same speeches that judge, by other speakers, which is more than a
    general corpus gives.

The authors' code was read: it counts at every token as many neurons as the prompt has positive ones
on average times token_share, keeps int(neurons * share) of the most counted, and slices the weights
at the first new token. Their second way, a prompt's nearest group of training sentences, is not
built here.

Not tested: that cores are alike where meanings are, which wants pairs of verses.

Who else would pass: any neurons (`random`), those of any text (`static`), and a model that never
needed the others, which `plain` would show.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor

from stratoscope.claims import Measured, claim
from stratoscope.editing import core_neurons, speed, top_k
from stratoscope.engine.pieces import before
from stratoscope.lab import data
from stratoscope.models import LM, wrap

KEEP, TEXTS, CORPUS, DRAWS = 0.4, 48, 48, 20
PROMPT, NEW = 64, 32  # tokens that are read, and that are judged
TIMED, SAID, REPEATS = 12, 16, 5


@claim(
    says="Weights of core neurons alone give what the whole model gives with all others silent",
    where="the authors' code (DownLayer, UpLayer, GateLayer)",
    tier="identity",
    subject="a random llama of three layers",
    expect="worst <= 0.00001 and wrong > 0.01",
    null={"wrong": "the same with neurons counted by their gate alone, not by what they write"},
)
def cut_is_masked(seed: int) -> Measured:
    """Logits of four tokens after a prompt, one by one; masked by plain hooks on Transformers."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    config = hf.LlamaConfig(
        **sizes, num_attention_heads=4, vocab_size=96, initializer_range=0.2, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.LlamaForCausalLM(config).eval()
    rows = np.random.default_rng(seed).integers(3, 96, (3, 16)).tolist()
    worst, wrong = [], []
    for row in rows:
        with core_neurons.edit(wrap(model), KEEP, from_layer=0):
            found = _one_by_one(model, row)
        right, other = (
            _one_by_one(model, row, _by_hand(model, row[:12], gate=gate)) for gate in (False, True)
        )
        worst.append(float((found - right).abs().max()))
        wrong.append(float((found - other).abs().max()))
    return Measured(values={"worst": max(worst)}, null={"wrong": min(wrong)}, n=len(rows))


@claim(
    says="The core neurons of a prompt, fixed when it has been read, are enough to go on with, and "
    "the model is faster with them alone",
    where="abstract; section 4 (stability-guided prediction), section 5 (speed)",
    read="authors' code",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="48 texts",
    valid="random_floor > plain_high",
    expect="over_oracle_high <= 0.15 and under_static_low >= 0.1 and "
    "random_floor >= core_high + 0.5 and speed_low >= 1.2",
    direction="under_static > 0 and core < random and speed > itself",
    null={
        "random": "loss with as many neurons of each layer, drawn at random, 20 draws",
        "itself": "the plain model's seconds for a token over its own, timed in turn",
    },
    thresholds="0.15, 0.10 and 0.5 nats and 1.2: the specification's, before anything was measured",
)
def a_fixed_core_is_enough(lm: LM, seed: int) -> Measured:
    """Nats a token of a speech after 64 tokens that were read whole, with their core alone in
    every layer but the first eighth; 31 tokens, each after one that the core has read. oracle:
    each token keeps its own 40 %, the largest in size; static: the 40 % most often counted in 48
    other speeches. Speed: seconds for a token, plain over core, weights cut out, batch 1."""
    generator = random.Random(seed)
    texts, corpus = (
        _windows(lm, split, generator, n) for split, n in (("test", TEXTS), ("train", CORPUS))
    )
    first = lm.dims.layers // 8
    counts = sum(torch.tensor(core_neurons.measure(lm, [text]).counts.values[0]) for text in corpus)
    static = core_neurons.most(counts, KEEP)
    static[:first] = True
    own = core_neurons.edit(lm, KEEP)
    k = round(KEEP * lm.dims.neurons)
    arms = {
        "plain": None,
        "core": own,
        "oracle": top_k.edit(lm, [(layer, k) for layer in range(first, lm.dims.layers)]),
        "static": core_neurons.edit(lm, static),
    }
    draws = [core_neurons.edit(lm, _random(lm, first, seed, draw)) for draw in range(DRAWS)]
    loss = {name: np.array([_loss(lm, text, arm) for text in texts]) for name, arm in arms.items()}
    at_random = [np.mean([_loss(lm, text, arm) for text in texts]) for arm in draws]
    timed = speed.compare(
        lm, [text[:PROMPT] for text in texts[:TIMED]], own, tokens=SAID, repeats=REPEATS
    )
    token = timed.sel(what="token")
    return Measured(
        units={
            "plain": loss["plain"],
            "core": loss["core"],
            "over_oracle": loss["core"] - loss["oracle"],
            "under_static": loss["static"] - loss["core"],
            "speed": token.gain.values,
        },
        values={"reading": float(timed.sel(what="text").gain.mean())},
        null={"random": at_random, "itself": float(token.itself.mean())},
        n=len(texts),
    )


@torch.no_grad()
def _loss(lm: LM, text: Sequence[int], arm: Any) -> float:
    """Nats a token after the prompt. The prompt is read by the whole model; an own core is found
    meanwhile."""
    ids = torch.tensor([list(text)], device=lm.model.device)
    start = ids.shape[1] - NEW
    finds = getattr(arm, "find", None) is not None
    with arm if finds else nullcontext():
        cache = lm.model(ids[:, :start], use_cache=True).cache
        with nullcontext() if finds or arm is None else arm:
            logits = lm.model(ids[:, start:-1], cache=copy.deepcopy(cache), use_cache=True).logits
    return float(torch.nn.functional.cross_entropy(logits[0].float(), ids[0, start + 1 :]))


def _random(lm: LM, first: int, seed: int, draw: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + draw)
    score = torch.rand(lm.dims.layers, lm.dims.neurons, generator=generator)
    core = core_neurons.most(score, KEEP)
    core[:first] = True
    return core


def _windows(lm: LM, split: str, generator: random.Random, n: int) -> list[list[int]]:
    """Pieces of speeches, as many tokens each, after what the model reads before any text."""
    speeches = [each["text"] for each in getattr(data("sotu"), split)]
    length, found = PROMPT + NEW, []
    for _ in range(n):
        text = generator.choice(speeches)
        at = generator.randrange(max(1, len(text) - 12 * length))
        ids = lm.tokenizer(text[at : at + 12 * length], add_special_tokens=False)["input_ids"]
        found.append([*before(lm), *ids[1 : length + 1]])  # the first may be the end of a word
    return found


@torch.no_grad()
def _one_by_one(model: Any, row: Sequence[int], core: list[Tensor] | None = None) -> Tensor:
    """Logits of the last four tokens with the others in the cache; masked where a core is given."""
    cache = model(torch.tensor([row[:12]]), use_cache=True).cache
    with nullcontext() if core is None else _masked(model, core):
        steps = [model(torch.tensor([[token]]), cache=cache).logits[0] for token in row[12:]]
    return torch.cat(steps)


@torch.no_grad()
def _by_hand(model: Any, row: Sequence[int], *, gate: bool) -> list[Tensor]:
    """Which neurons of each layer are the prompt's core, by sorting; gate: counted by that."""
    found: list[Tensor] = []

    def hook(module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        opened = module.act_fn(module.gate_proj(args[0][0]))
        act = opened if gate else opened * module.up_proj(args[0][0])
        counts = torch.zeros(act.shape[1])
        for token in act:
            positive = token[token > 0].sort(descending=True).values
            counts += token >= positive[int(np.ceil(0.2 * len(positive))) - 1]
        order = np.lexsort((-act.sum(dim=0).numpy(), -counts.numpy()))
        mask = torch.zeros(act.shape[1])
        mask[order[: round(KEEP * len(mask))].tolist()] = 1
        found.append(mask)

    handles = [layer.mlp.register_forward_hook(hook) for layer in model.model.layers]
    model(torch.tensor([list(row)]))
    for handle in handles:
        handle.remove()
    return found


@contextmanager
def _masked(model: Any, core: list[Tensor]) -> Any:
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
        for layer, mask in zip(model.model.layers, core)
    ]
    yield
    for handle in handles:
        handle.remove()
