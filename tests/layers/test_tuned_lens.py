"""The tuned lens against a plain loop of PyTorch, a planted affine map, and the logit lens."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from stratoscope.engine.intervene import add, intervene, permuted, project_out, scaled
from stratoscope.engine.train import epoch_rows
from stratoscope.errors import InputError, LoadError, ResultError
from stratoscope.layers import logit_lens, tuned_lens
from stratoscope.models import LM, wrap
from support import tiny
from support.cases import Case
from support.subjects import close, lm_of, parts, untouched

RNG = torch.Generator().manual_seed(5)
TEXTS = [torch.randint(3, 96, (24,), generator=RNG).tolist() for _ in range(48)]
PROMPT, OTHER = [3, 14, 15, 92, 65, 35], [3, 14, 17, 92]


def drawn(lm: LM, size: float = 0.02, seed: int = 0) -> tuned_lens.TunedLens:
    """A lens of random maps."""
    rng = torch.Generator().manual_seed(seed)
    layers, dim = lm.dims.layers, lm.dims.dim
    weight, bias = (torch.randn(*s, generator=rng) for s in ((layers, dim, dim), (layers, dim)))
    return tuned_lens.TunedLens(
        weight=size * weight, bias=size * bias, settings={}, seed=None, provenance={}
    )


def _rows(case: Case) -> list[list[int]]:
    """Words alone: a picture's places are no text to be cut."""
    return [row[5:] if case.name == "llava" else row for row in case.rows]


EXAMPLE = {
    "fit": lambda case: {"inputs": _rows(case), "steps": 3, "batch_size": 1, "context": 6},
    "measure": lambda case: {"lens": drawn(case.lm), "answer": case.answer},
}
ONE_TOKEN = "read as the next token"
WHOLE_ANSWER = {  # of the tiny Llama's size
    "lens": tuned_lens.TunedLens(
        weight=torch.zeros(3, 32, 32),
        bias=torch.zeros(3, 32),
        settings={},
        seed=None,
        provenance={},
    )
}


def said(lm: LM, h: Tensor) -> Tensor:
    """The model's own read-out, in plain Hugging Face."""
    return lm.model.lm_head(lm.layout.final_norm(h))


def kl(own: Tensor, other: Tensor) -> Tensor:
    log = own.log_softmax(-1)
    return nn.functional.kl_div(other.log_softmax(-1), log, log_target=True, reduction="none").sum(
        -1
    )


def hidden(lm: LM, rows: list[list[int]]) -> list[Tensor]:
    """What stands at every depth before the final norm: Hugging Face gives the last one after it,
    so a plain hook takes it."""
    kept: list[Tensor] = []
    norm = lm.layout.final_norm
    hook = norm.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    with torch.no_grad():
        out = lm.model(torch.tensor(rows), output_hidden_states=True)
    hook.remove()
    return [*out.hidden_states[:-1], kept[0]]


def by_hand(lm: LM, steps: int, rate: float, decay: float) -> tuple[list[Any], list[list[float]]]:
    """The plain loop: a linear layer for each depth that begins at 0, the same data and optimiser;
    with the losses of every depth at every step."""
    lines = [nn.Linear(32, 32) for _ in range(lm.dims.layers)]
    for parameter in (p for line in lines for p in line.parameters()):
        nn.init.zeros_(parameter)
    every = [p for line in lines for p in line.parameters()]
    optimiser = torch.optim.AdamW(every, lr=rate, betas=(0.9, 0.999), weight_decay=decay)
    losses, warm = [], steps // 20
    lm.model.requires_grad_(False)
    for step in range(steps):
        rows = [[1, *TEXTS[n]] for n in epoch_rows(len(TEXTS), 8, step, 0).tolist()]
        streams = hidden(lm, rows)
        own = said(lm, streams[-1])
        each = [kl(own, said(lm, h + line(h))).mean() for h, line in zip(streams, lines)]
        losses.append([float(x.detach()) for x in each])
        fall = 0.55 + 0.45 * math.cos(math.pi * max(0, step - warm) / (steps - warm))
        optimiser.param_groups[0]["lr"] = rate * min(1, (step + 1) / warm) * fall
        optimiser.zero_grad()
        (torch.stack(each).sum() / len(each)).backward()
        optimiser.step()
    return lines, losses


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_a_plain_loop_of_pytorch(name: str) -> None:
    lm = lm_of(name)
    with untouched(lm):
        lens = tuned_lens.fit(lm, TEXTS, steps=40, batch_size=8, context=25, rate=1e-3, decay=1e-3)
    other = lm_of(name)
    lines, losses = by_hand(other, 40, 1e-3, 1e-3)
    for depth, line in enumerate(lines):
        close(lens.weight[depth], line.weight.detach(), 1e-5)
        close(lens.bias[depth], line.bias.detach(), 1e-5)
    close([loss for _, loss in lens.curve], [np.mean(row) for row in losses], 1e-5)
    seen = tuned_lens.measure(lm, TEXTS[:4], lens=lens)
    streams = hidden(other, TEXTS[:4])
    for depth in range(lm.dims.layers):
        with torch.no_grad():
            own = said(other, streams[-1])
            wanted = kl(own, said(other, streams[depth] + lines[depth](streams[depth])))
            plain = kl(own, said(other, streams[depth]))
        close(seen.kl[:, depth], wanted, 1e-5)
        close(seen.logit_lens_kl[:, depth], plain, 1e-5)


def test_the_loss_in_pieces_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, found = lm_of("llama"), []
    for size in (2**26, 4 * 96 * 7):  # all tokens at once, and seven
        monkeypatch.setattr("stratoscope.layers._translators._LOGITS", size)
        lens = tuned_lens.fit(lm, TEXTS, steps=3, batch_size=4, context=25)
        seen = tuned_lens.measure(lm, [PROMPT, OTHER], lens=lens)
        found.append((lens.weight, lens.curve[-1], seen.kl, seen.answer_rank))
    for one, two in zip(*found):
        close(one, two, 1e-6)


def test_an_untrained_lens_is_the_logit_lens() -> None:
    lm = lm_of("gemma2")  # with a soft-cap
    seen = tuned_lens.measure(lm, [PROMPT, OTHER], lens=drawn(lm, 0.0), answer=7)
    plain = logit_lens.measure(lm, [PROMPT, OTHER], answer=7)
    for name in ("probability", "answer_rank", "answer_probability"):
        close(seen[name], plain[name], 1e-6)
    assert (seen.token.values == plain.token.values).all()
    close(seen.kl, seen.logit_lens_kl, 1e-6)
    assert float(abs(seen.gain).max()) < 1e-6
    moved = tuned_lens.measure(lm, [PROMPT, OTHER], lens=drawn(lm, 0.05), answer=7)
    assert float(abs(moved.kl[:, -1]).max()) < 1e-6  # there is nothing to translate at the end
    assert float(abs(moved.gain[:-1]).min()) > 1e-4


def test_a_planted_affine_map_is_found() -> None:
    """Layers write nothing, and what leaves the last is turned, stretched and moved: from every
    depth the way to the end is one known affine map."""
    rng = torch.Generator().manual_seed(3)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 48, "head_dim": 4}
    lm = wrap(hf.LlamaForCausalLM(hf.LlamaConfig(**tiny.GROUPED | small)).eval())
    with torch.no_grad():
        for part in [part for layer in range(2) for part in parts(lm, layer)]:
            part.weight.zero_()
        for table, size in ((lm.model.model.embed_tokens, 1.0), (lm.model.lm_head, 0.2)):
            nn.init.orthogonal_(table.weight, size * 48**0.5, generator=rng)
    texts = [[3 + i % 45 for i in row] for row in TEXTS]
    stretch, line, shift = (torch.randn(16, generator=rng) for _ in range(3))
    order, stretch, unit = torch.arange(16).roll(3), 1 + 0.3 * stretch, line / line.norm()
    site = "layers.1.resid_post"
    changes = (
        permuted(site, order), scaled(site, stretch), project_out(site, unit), add(site, shift),
    )  # fmt: skip
    turned = torch.eye(16)[order] * stretch[:, None]
    wanted = torch.cat([turned - unit[:, None] * (unit @ turned), shift[:, None]], dim=1)
    with intervene(lm, *changes):
        lens = tuned_lens.fit(lm, texts, steps=400, batch_size=4, context=25, rate=0.05, decay=0.0)
        seen = tuned_lens.measure(lm, texts[:8], lens=lens)
    for depth in range(2):
        found = torch.cat([torch.eye(16) + lens.weight[depth], lens.bias[depth, :, None]], dim=1)
        length = (found * wanted).sum() / (wanted * wanted).sum()  # which a norm does not see
        assert float((found / length - wanted).norm() / wanted.norm()) < 0.02
    assert float(seen.mean_kl.max()) < 1e-4
    assert float(seen.mean_logit_lens_kl[:2].min()) > 0.2
    assert float(seen.gain_low[:2].min()) > 0.2


def test_a_change_after_the_layers_is_heard_and_not_fitted_to() -> None:
    lm = lm_of("llama")
    lens, streams = drawn(lm, 0.05), hidden(lm_of("llama"), [PROMPT])
    with intervene(lm, scaled("logits", 0.5)):
        seen = tuned_lens.measure(lm, [PROMPT], lens=lens)
        with pytest.raises(InputError, match="a change at the final norm"):
            tuned_lens.fit(lm, TEXTS, steps=1, batch_size=1, context=9)
    with torch.no_grad():
        own, mine = (said(lm, h) / 2 for h in (streams[-1], lens(streams[1], 1)))
    close(seen.kl[0, 1], kl(own, mine)[0], 1e-5)
    close(seen.probability[0, 1, :, 0], mine.softmax(-1)[0].amax(-1), 1e-5)


def test_a_published_lens_is_read_and_written(tmp_path: Path) -> None:
    lm = lm_of("gpt2")
    lens = drawn(lm)
    tuned_lens.to_published(lens, tmp_path, lm)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "params.pt"]
    config = json.loads((tmp_path / "config.json").read_text())
    state = torch.load(tmp_path / "params.pt", weights_only=True)
    assert (config["d_model"], config["num_hidden_layers"], config["bias"]) == (32, 3, True)
    assert config["lens_type"] == "linear_tuned_lens"
    numbers = lm.model.lm_head.weight.detach().numpy()
    printed = np.array_str(numbers, precision=1).encode()
    assert config["unembed_hash"] == hashlib.sha256(printed).hexdigest()
    lines = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))  # what the package loads them into
    lines.load_state_dict(state)
    h = torch.randn(2, 32, generator=RNG)
    for depth, line in enumerate(lines):
        close(lens(h, depth), (h + line(h)).detach(), 1e-6)
    seen = tuned_lens.measure(lm, [PROMPT], lens=tmp_path)
    close(seen.kl, tuned_lens.measure(lm, [PROMPT], lens=lens).kl, 1e-7)
    with torch.no_grad():
        lm.model.lm_head.weight.add_(1)
    with pytest.raises(InputError, match="this model has another"):
        tuned_lens.from_published(tmp_path, lm)
    tuned_lens.from_published(tmp_path, lm, foreign=True)
    other = tuned_lens.TunedLens(
        weight=lens.weight[:2], bias=lens.bias[:2], settings={}, seed=None, provenance={}
    )
    with pytest.raises(InputError, match="3 layers of width 32"):
        tuned_lens.measure(lm, [PROMPT], lens=other)


def test_what_would_run_something_is_refused(tmp_path: Path) -> None:
    lm = lm_of("llama")
    tuned_lens.to_published(drawn(lm), tmp_path, lm)
    torch.save({"0.weight": nn.Linear(2, 2)}, tmp_path / "params.pt")  # a pickle of a class
    with pytest.raises(LoadError, match="cannot be read as a tuned lens"):
        tuned_lens.from_published(tmp_path, lm)
    torch.save({"0.weight": torch.zeros(2, 2)}, tmp_path / "params.pt")
    with pytest.raises(LoadError, match="cannot be read as a tuned lens"):
        tuned_lens.from_published(tmp_path, lm)


def test_a_folder_is_kept_and_of_one_model(tmp_path: Path) -> None:
    lm = lm_of("llama")
    more = {"steps": 2, "batch_size": 4, "context": 9}
    made = tuned_lens.fit(lm, TEXTS, folder=tmp_path, **more)
    assert len(list(tmp_path.iterdir())) == 2
    again = tuned_lens.fit(lm, TEXTS, folder=tmp_path, **more)
    assert torch.equal(made.weight, again.weight)
    assert made.weight.abs().sum() > 0
    with pytest.raises(ResultError, match="another lens"):
        tuned_lens.fit(lm, TEXTS, folder=tmp_path, **more | {"seed": 1})
    with pytest.raises(InputError, match="fitted on LlamaForCausalLM"):
        tuned_lens.measure(wrap(tiny.model("llama", seed=1)), [PROMPT], lens=tmp_path)
    with pytest.raises(InputError, match="batch_size=17 of 16 windows"):
        tuned_lens.fit(lm, TEXTS[:16], batch_size=17)
    with pytest.raises(InputError, match="context=65"):
        tuned_lens.fit(lm_of("gpt2"), TEXTS, context=65)
