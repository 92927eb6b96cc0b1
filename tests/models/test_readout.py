"""What a model makes of its last stream: heads found among the model's modules, believed by its own
output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from stratoscope.engine.gradients import gradients
from stratoscope.engine.intervene import ablate, add, intervene
from stratoscope.engine.metric import last_logits, target
from stratoscope.engine.sweep import naive, sweep
from stratoscope.errors import InputError, SiteError
from stratoscope.layers import direct_logit_attribution
from stratoscope.models import wrap
from stratoscope.tokens import next_token
from support import tiny

S, G = tiny.SMALL, tiny.GROUPED
LABELS = {
    "id2label": {0: "sad", 1: "so-so", 2: "glad"},
    "label2id": {"sad": 0, "so-so": 1, "glad": 2},
}
_DISTIL = {
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 3,
    "n_heads": 4,
    "vocab_size": 96,
    "pad_token_id": 0,
}
_MODERN = S | {
    "cls_token_id": 1,
    "sep_token_id": 2,
    "global_attn_every_n_layers": 2,
    "local_attention": 4,
}

# name -> how to make it, what is read ("every" position, the "last", ...), and how many outputs
HEADS: dict[str, tuple[Any, str, int]] = {
    "bert": (lambda: (hf.BertForSequenceClassification, hf.BertConfig(**S, **LABELS)), "first", 3),
    "bert next sentence": (
        lambda: (hf.BertForNextSentencePrediction, hf.BertConfig(**S)),
        "first",
        2,
    ),
    "bert tokens": (
        lambda: (hf.BertForTokenClassification, hf.BertConfig(**S, **LABELS)),
        "every",
        3,
    ),
    "bert answers": (lambda: (hf.BertForQuestionAnswering, hf.BertConfig(**S)), "every", 2),
    "roberta": (
        lambda: (hf.RobertaForSequenceClassification, hf.RobertaConfig(**S, **LABELS)),
        "first",
        3,
    ),
    "distilbert": (
        lambda: (hf.DistilBertForSequenceClassification, hf.DistilBertConfig(**_DISTIL)),
        "first",
        2,
    ),
    "llama": (
        lambda: (hf.LlamaForSequenceClassification, hf.LlamaConfig(**G, **LABELS)),
        "last",
        3,
    ),
    "reward": (
        lambda: (hf.LlamaForSequenceClassification, hf.LlamaConfig(**G, num_labels=1)),
        "last",
        1,
    ),
    "llama tokens": (lambda: (hf.LlamaForTokenClassification, hf.LlamaConfig(**G)), "every", 2),
    "gemma 3": (
        lambda: (
            hf.Gemma3TextForSequenceClassification,
            hf.Gemma3TextConfig(**tiny._sliding(), **LABELS),
        ),
        "last",
        3,
    ),
    "modernbert class token": (
        lambda: (
            hf.ModernBertForSequenceClassification,
            hf.ModernBertConfig(**_MODERN, classifier_pooling="cls"),
        ),
        "first",
        2,
    ),
    "modernbert mean": (
        lambda: (
            hf.ModernBertForSequenceClassification,
            hf.ModernBertConfig(**_MODERN, classifier_pooling="mean"),
        ),
        "mean",
        2,
    ),
}
ROWS = [[3, 14, 15, 92, 65, 35, 89, 79, 32], [38, 46, 26, 43, 3]]


def build(name: str) -> Any:
    kind, config = HEADS[name][0]()
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def said(model: Any, row: list[int]) -> torch.Tensor:
    """What plain Transformers says of one prompt alone: (output,), at the last token where every
    one has its own."""
    out = model(input_ids=torch.tensor([row]))
    x = (
        torch.stack([out.start_logits, out.end_logits], dim=-1)
        if "start_logits" in out
        else out.logits
    )
    return x[0, -1] if x.ndim == 3 else x[0]


@pytest.mark.parametrize("name", HEADS)
def test_the_metric_is_given_what_the_model_says(name: str) -> None:
    """Ablations by a plain hook on the module, each prompt alone, against a padded sweep."""
    model, (_, where, size) = build(name), HEADS[name]
    lm = wrap(model)
    assert (lm.readout.where, lm.readout.size) == (where, size)
    assert lm.readout.kind == ("values" if size == 1 else "classes")
    expected = torch.stack([said(model, row) for row in ROWS])
    assert tiny.gap(last_logits(lm, ROWS), expected) < 1e-4
    cell = ablate("layers.1.mlp.out")
    module = lm.layout.locate(lm.layout.resolve_one("layers.1.mlp.out"))[0]
    hook = module.register_forward_hook(lambda m, args, out: 0 * out)
    cut = torch.stack([said(model, row) for row in ROWS])
    hook.remove()
    for output in range(size):
        metric = lambda logits, e, output=output: logits[:, output]  # noqa: E731
        for run in (sweep, naive):
            assert tiny.gap(run(lm, ROWS, [cell], metric)[0], cut[:, output]) < 1e-4
    value, _, _ = gradients(lm, ROWS, ["layers.1.mlp.out"], lambda logits: logits[:, 0])
    assert tiny.gap(value, expected[:, 0]) < 1e-4


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_answers_are_classes_by_name_or_number(name: str) -> None:
    lm = wrap(build(name))
    expected = torch.stack([said(lm.model, row) for row in ROWS])
    asked = target(lm, ROWS, "glad", 0)
    assert asked.answer_text == ("glad", "glad")
    assert tiny.gap(asked.difference(expected), expected[:, 2] - expected[:, 0]) == 0
    found = next_token.measure(lm, ROWS)
    assert found.sizes["rank"] == 3
    assert found["token"].values[:, 0].tolist() == [
        lm.readout.names[i] for i in expected.argmax(dim=1)
    ]
    assert tiny.gap(found["probability"].sum("rank").values, torch.ones(2)) < 1e-6
    with pytest.raises(InputError, match="no class of this model; it has sad, so-so, glad"):
        target(lm, ROWS, "happy")
    with pytest.raises(InputError, match="outside the read-out of 3 outputs"):
        target(lm, ROWS, 3)
    with pytest.raises(InputError, match="same class 'sad'"):
        target(lm, ROWS, "sad", 0)


def test_the_logits_of_a_picture_s_classes() -> None:
    lm, given = tiny.lm("vit"), tiny.inputs("vit")
    with torch.no_grad():
        expected = lm.model(**given).logits
    found = next_token.measure(lm, given, top=10)
    assert found.sizes["rank"] == 5
    assert found["token"].values[0, 0] == f"LABEL_{int(expected.argmax())}"
    assert tiny.gap(last_logits(lm, given), expected) < 1e-5


def test_the_logits_site_of_a_classifier() -> None:
    lm = wrap(build("bert"))
    bump = torch.tensor([0.0, 0.0, 5.0])
    plain = lm(ROWS).logits
    with intervene(lm, add("logits", bump)):
        assert tiny.gap(lm(ROWS).logits, plain + bump) < 1e-6
    with pytest.raises(SiteError, match="start_logits and end_logits"):
        wrap(build("bert answers")).sites("logits")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: setattr(m, "forward", _doubled(m)), "could not be rebuilt"),
        (lambda m: torch.nn.init.zeros_(m.score.weight), "answers every prompt alike"),
    ],
)
def test_a_head_that_cannot_be_rebuilt_is_refused_with_the_reason(spoil: Any, reason: str) -> None:
    """Never residuals for logits: sites inside the layers can be read, the metric cannot."""
    model = build("llama")
    with torch.no_grad():
        spoil(model)
    lm = wrap(model)
    assert lm.readout.kind == "unknown"
    for ask in (
        lambda: last_logits(lm, ROWS),
        lambda: sweep(
            lm, ROWS, [ablate("layers.1.mlp.out")], lambda logits, e: logits[:, 1] - logits[:, 0]
        ),
        lambda: gradients(lm, ROWS, ["layers.1.mlp.out"], lambda logits: logits[:, 0]),
        lambda: lm.sites("logits"),
    ):
        with pytest.raises(SiteError, match=reason):
            ask()


def _doubled(model: Any) -> Any:
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = out.logits.cumsum(dim=-1) ** 2
        return out

    return forward


def test_a_prompt_that_ends_in_the_classifier_s_padding_is_refused() -> None:
    lm = wrap(build("llama"))
    with pytest.raises(
        InputError, match="ends with token 0, which this classifier takes for padding"
    ):
        sweep(lm, [[5, 6, 0]], [ablate("layers.1.mlp.out")], lambda logits, e: logits[:, 0])


def test_dropout_of_a_head_is_still() -> None:
    """A model in training mode: the head's dropout must not reach a measure, and its flags stay as
    they were."""
    model = build("roberta").train()
    lm = wrap(model)
    assert torch.equal(last_logits(lm, ROWS), last_logits(lm, ROWS))
    assert all(m.training for m in model.modules())


def test_attribution_of_a_picture_s_class_is_read_at_its_class_token() -> None:
    lm, given = tiny.lm("vit"), tiny.inputs("vit")
    found = direct_logit_attribution.measure(lm, given, answer=1, foil=2)
    with torch.no_grad():
        logits = lm.model(**given).logits[0]
    assert float(found["logit_difference"][0]) == pytest.approx(
        float(logits[1] - logits[2]), abs=1e-4
    )
    assert abs(float(found["residual_error"][0])) < 1e-4
