"""Made-up explanations with the shapes of a small real model: 30 layers, 9 heads, 1536 neurons, 18
tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import xarray as xr

from stratoscope.report.page import Explanation

LAYERS, HEADS, NEURONS = 30, 9, 1536
TOKENS = [
    "When",
    " Mary",
    " and",
    " John",
    " went",
    " to",
    " the",
    " shop",
    " yesterday",
    ",",
    " John",
    " gave",
]
TOKENS += [" a", " bottle", " of", " cold", " milk", " to"]
CORRUPT = [*TOKENS[:10], " Mary", *TOKENS[11:]]
ANSWER, FOIL = " Mary", " John"
WORDS = [
    " the",
    " her",
    " them",
    " him",
    " their",
    " his",
    " a",
    " each",
    ",",
    "\n",
    " it",
    " everyone",
    " shop",
    " town",
]


def _pair(
    name: str, values: np.ndarray, null: np.ndarray, dims: tuple[str, ...], **attrs: str
) -> xr.Dataset:
    text = {
        "text": (("example", "position"), [TOKENS]),
        "corrupt_text": (("example", "position"), [CORRUPT]),
    }
    return xr.Dataset(
        {
            "effect": (("example", *dims), values[None]),
            "null": (("example", *dims), null[None]),
            "bound": ("example", [np.abs(null).max()]),
            "clean_difference": ("example", [3.41]),
            "corrupt_difference": ("example", [-2.87]),
        },
        coords=text,
        attrs={"answer": ANSWER, "foil": FOIL, "site": name, "draws": 20, **attrs},
    )


def logit_lens(rng: np.random.Generator, words: list[str]) -> xr.Dataset:
    depth, n, best = LAYERS + 1, len(TOKENS), 10
    sharp = np.linspace(0.2, 4.5, depth)[:, None, None] * np.linspace(1, 0.1, best) + rng.normal(
        0, 0.15, (depth, n, best)
    )
    probability = np.sort(np.exp(sharp) / (np.exp(sharp).sum(-1, keepdims=True) + 20), axis=-1)[
        ..., ::-1
    ]
    token = rng.choice(np.array(words, dtype=object), (depth, n, best))
    token[26:, -1, 0] = ANSWER
    rank = np.maximum(0, (30000 * np.exp(-np.arange(depth) / 2.55)).astype(int) - 1)[
        :, None
    ].repeat(n, 1)
    rank[26:] = 0
    own = 0.62 / (1 + np.exp(-(np.arange(depth) - 26.0)))[:, None].repeat(n, 1)
    four = ("example", "depth", "position", "rank")
    return xr.Dataset(
        {
            "probability": (four, probability[None]),
            "token": (four, token[None].astype(str)),
            "answer_rank": (four[:3], rank[None]),
            "answer_probability": (four[:3], own[None] * np.array([1.0] * depth)[None, :, None]),
        },
        coords={"text": (("example", "position"), [TOKENS])},
        attrs={"answer": ANSWER},
    )


def direct(rng: np.random.Generator) -> xr.Dataset:
    rows = [("embed", -1, -1, "embed", 0.02)]
    for layer in range(LAYERS):
        scale = 0.02 + 0.25 * max(0, layer - 15) / 14
        rows += [
            (f"L{layer}H{h}", layer, h, "head", rng.normal(0, scale) * rng.exponential(0.5))
            for h in range(HEADS)
        ]
        rows.append((f"L{layer} mlp", layer, -1, "mlp", rng.normal(0, 2 * scale)))
    rows.append(("bias", -1, -1, "bias", 0.0))
    value = np.array([r[4] for r in rows])
    value[1 + 10 * 21 + 3] = 1.93
    value[1 + 10 * 24 + 7] = -0.88
    return xr.Dataset(
        {
            "contribution": (("example", "component"), value[None]),
            "raises_answer": (("example", "component"), 0.25 * value[None]),
            "lowers_foil": (("example", "component"), 0.75 * value[None]),
            "logit_difference": ("example", [value.sum() + 2e-6]),
            "total": ("example", [value.sum()]),
            "residual_error": ("example", [2e-6]),
        },
        coords={
            "component": [r[0] for r in rows],
            "layer": ("component", [r[1] for r in rows]),
            "head": ("component", [r[2] for r in rows]),
            "kind": ("component", [r[3] for r in rows]),
        },
        attrs={"answer": ANSWER, "foil": FOIL},
    )


def patching(rng: np.random.Generator) -> tuple[xr.Dataset, xr.Dataset]:
    layer = np.arange(LAYERS)
    residual = rng.normal(0, 0.012, (LAYERS, len(TOKENS)))
    residual[:, 10] += 1 / (1 + np.exp((layer - 15) / 1.2))
    residual[:, 11] += 0.25 * np.exp(-((layer - 13) ** 2) / 8)
    residual[:, -1] += 1 / (1 + np.exp(-(layer - 18) / 1.2))
    heads = rng.normal(0, 0.01, (LAYERS, HEADS))
    for (at, head), effect in {
        (12, 2): 0.18,
        (14, 5): 0.31,
        (17, 1): 0.22,
        (21, 3): 0.44,
        (24, 7): -0.19,
        (4, 0): 0.12,
    }.items():
        heads[at, head] = effect
    how = (
        "The same patch with the corrupt activation of a random other position, drawn with the "
        "run's seed."
    )
    return (
        _pair(
            "layers.*.resid_pre",
            residual,
            rng.normal(0, 0.02, residual.shape),
            ("layer", "position"),
            null_kind=how,
        ),
        _pair(
            "layers.*.attn.z",
            heads,
            rng.normal(0, 0.015, heads.shape),
            ("layer", "head"),
            null_kind=how,
        ),
    )


def pattern(rng: np.random.Generator) -> xr.DataArray:
    n = len(TOKENS)
    logits = rng.normal(0, 1.2, (LAYERS, HEADS, n, n))
    logits[..., 0] += 2.5
    logits[14, 5] += 5 * np.eye(n, k=-1)
    logits[21, 3, -1, 1] += 6
    logits = np.where(np.tril(np.ones((n, n))) > 0, logits, -np.inf)
    weights = np.exp(logits)
    return xr.DataArray(
        (weights / weights.sum(-1, keepdims=True))[None],
        dims=("example", "layer", "head", "query", "key"),
        coords={
            "text_query": (("example", "query"), [TOKENS]),
            "text_key": (("example", "key"), [TOKENS]),
        },
        name="pattern",
    )


def roles(rng: np.random.Generator) -> xr.Dataset:
    names = ["previous_token", "duplicate_token", "induction", "copying", "name_mover"]
    score = np.clip(rng.normal(0.05, 0.05, (LAYERS, HEADS, 5)), 0, 1)
    score[14, 5, 0], score[12, 2, 1], score[17, 1, 2], score[21, 3, 3:] = (
        0.81,
        0.44,
        0.63,
        (0.72, 0.55),
    )
    return xr.Dataset(
        {
            "score": (("layer", "head", "role"), score),
            "null": (("layer", "head", "role"), np.clip(rng.normal(0.05, 0.03, score.shape), 0, 1)),
        },
        coords={"role": names},
        attrs={
            "definition_previous_token": "Mean attention weight from each token to the token "
            "before it.",
            "definition_duplicate_token": "Mean attention from a repeated token to its earlier "
            "occurrence.",
            "definition_induction": "Mean attention from a repeated token to what followed it "
            "earlier.",
            "definition_copying": "Share of tokens whose own logit the head's OV circuit raises "
            "most.",
            "definition_name_mover": "Correlation of the attention to a token with the logit given "
            "to it.",
        },
    )


def neurons(
    rng: np.random.Generator, words: list[str]
) -> tuple[xr.Dataset, xr.Dataset, xr.Dataset]:
    shape = (LAYERS, NEURONS)
    contribution = rng.normal(0, 0.004, shape)
    units = [(28, 1203), (27, 77), (25, 640), (29, 1500), (22, 9), (24, 411), (26, 1024), (20, 350)]
    for (layer, neuron), value in zip(units, [0.52, 0.31, -0.27, 0.2, 0.16, -0.12, 0.11, 0.09]):
        contribution[layer, neuron] = value
    at = {"layer": ("unit", [u[0] for u in units]), "neuron": ("unit", [u[1] for u in units])}
    drawn = [
        rng.choice(np.array(words, dtype=object), (len(units), 10)).astype(str) for _ in range(2)
    ]
    logits = np.sort(rng.exponential(0.6, (len(units), 10)))[:, ::-1]
    both = ("unit", "rank")
    vocabulary = xr.Dataset(
        {
            "promoted": (both, drawn[0]),
            "suppressed": (both, drawn[1]),
            "promoted_logit": (both, logits),
            "suppressed_logit": (both, -logits),
        },
        coords=at,
    )
    measured = xr.Dataset(
        {
            "activation": (("example", "layer", "neuron"), rng.normal(0, 1, shape)[None]),
            "contribution": (("example", "layer", "neuron"), contribution[None]),
        },
        attrs={"answer": ANSWER, "foil": FOIL},
    )
    before = np.full(len(units), 3.41)
    after = before - np.array([0.61, 0.28, -0.2, 0.22, 0.1, -0.1, 0.05, 0.02])
    clamp = xr.Dataset(
        {
            "difference_before": ("unit", before),
            "difference_after": ("unit", after),
            "null_change": ("draw", rng.normal(0, 0.02, 20)),
        },
        coords=at,
    )
    return measured, vocabulary, clamp


def attributions(rng: np.random.Generator) -> dict[str, xr.Dataset]:
    base = rng.normal(0, 0.12, len(TOKENS))
    base[[1, 3, 10, 11]] += [2.1, -0.5, 1.1, 0.3]
    made = {}
    for name, noise in {"shapley": 0.1, "occlusion": 0.2}.items():
        value = base + rng.normal(0, noise, len(TOKENS))
        made[f"tokens.{name}"] = xr.Dataset(
            {"attribution": (("example", "position"), value[None])},
            coords={"text": (("example", "position"), [TOKENS])},
        )
    made["tokens.shapley"]["standard_error"] = (("example", "position"), [[0.2] * len(TOKENS)])
    for name, value in {"passes": 448, "logit_difference": 3.4, "absent_difference": 0.2}.items():
        made["tokens.shapley"][name] = ("example", [value])
    return made


def circuit(rng: np.random.Generator) -> xr.Dataset:
    """A chain of four edges, and curves that rise with its size."""
    names = ["embed", "L3H2", "L5 mlp", "L9H1"]
    receivers = ["L3H2.q", "L5 mlp", "L9H1.v", "logits"]
    sizes = [1, 4, 16, 64]
    rising = np.array([0.0, 0.95, 0.99, 1.0])
    return xr.Dataset(
        {
            "effect": ("edge", rng.normal(0.3, 0.2, 4)),
            "faithfulness": ("step", rising),
            "completeness": ("step", 1 - rising),
            "minimality": ("step", rising / 2),
            "null_faithfulness": (("step", "draw"), rng.normal(0, 0.05, (4, 2))),
        },
        coords={
            "sender": ("edge", names),
            "receiver": ("edge", receivers),
            "size": ("step", sizes),
        },
        attrs={"of": 1200},
    )


def explanation(words: list[str] = WORDS, seed: int = 0) -> Explanation:
    """A whole explanation, every result present; `words` are the vocabulary of its top tokens."""
    rng = np.random.default_rng(seed)
    residual, heads = patching(rng)
    measured, vocabulary, clamp = neurons(rng, words)
    says = (
        'The model prefers " Mary" over " John" by 3.41 logits. Most speaks for it " Mary" '
        '(+2.1) and the second " John" (+1.1); the first " John" speaks against it (−0.5).'
    )
    tail = [0.071, 0.052, 0.034, 0.021, 0.019, 0.012, 0.008, 0.006]
    return Explanation(
        prompt="".join(TOKENS),
        tokens=TOKENS,
        answer=ANSWER,
        foil=FOIL,
        corrupt_prompt="".join(CORRUPT),
        corrupt_how='The name that gives was exchanged: the second " John" became " Mary".',
        notes=[
            "The prompt has no beginning-of-sequence token; this model was trained without one."
        ],
        predictions=[(ANSWER, 0.621), (FOIL, 0.142), *zip(words, tail)],
        results={
            "layers.logit_lens": logit_lens(rng, words),
            "layers.direct_logit_attribution": direct(rng),
            "layers.activation_patching": residual,
            "heads.activation_patching": heads,
            "heads.attention_pattern": pattern(rng),
            "heads.roles": roles(rng),
            "neurons.contribution": measured,
            "neurons.vocabulary": vocabulary,
            "clamp": clamp,
            **attributions(rng),
            "tokens.verbalize": xr.Dataset({"text": ("example", [says])}),
            "circuits.discover": circuit(rng),
        },
        provenance={
            "model": "HuggingFaceTB/SmolLM2-135M",
            "weights": "sha256:93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
            "dtype": "float32",
            "kernel": "stratoscope",
            "device": "cpu",
            "versions": {
                "stratoscope": "0.1.0",
                "torch": "2.13.0",
                "transformers": "5.23.0",
                "python": "3.11.9",
            },
            "seed": 0,
            "seconds": 41.8,
            "peak_memory_mb": 1480.0,
            "seconds_by_step": {
                "load": 2.1,
                "logit lens": 0.6,
                "patch layers": 14.2,
                "patch heads": 17.9,
                "Shapley values": 4.4,
                "page": 1.2,
            },
            "command": "stratoscope explain HuggingFaceTB/SmolLM2-135M 'When Mary and John ...' "
            "--out out/",
        },
    )


@pytest.fixture(scope="session")
def make() -> Callable[..., Explanation]:
    """The factory `explanation`, for a test that wants its own words or changes some fields."""
    return explanation
