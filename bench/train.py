"""Tokens a second of our training loop beside Transformers' Trainer, in one process.

    python bench/train.py           about a minute; prints the ratio and writes bench/train.json

A Llama of tiny-gpt's size (4 layers, width 160, 2048 tokens) reads random ids, 8 rows of 256 a
step. Both loops take the same batches, loss, optimiser and rates (`engine.objective.as_trainer`),
in turns; the fastest round of each counts. That the losses of all steps are equal is checked first.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
import transformers as hf

import stratoscope
from stratoscope.engine import objective
from stratoscope.engine.train import train
from stratoscope.training import language_model

STEPS, ROWS, LENGTH, ROUNDS, RATE = 15, 8, 256, 3, 1e-3


def subject() -> stratoscope.models.LM:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=2048,
        hidden_size=160,
        intermediate_size=416,
        num_hidden_layers=4,
        num_attention_heads=5,
        max_position_embeddings=LENGTH,
    )
    return stratoscope.wrap(hf.LlamaForCausalLM(config).eval())


def ours(lm: Any, rows: list[list[int]], folder: Path) -> tuple[float, list[float]]:
    recipe = objective.recipe_of(
        language_model, lm, rows, steps=STEPS, rate=RATE, batch_size=ROWS, seed=0
    )
    begun = time.perf_counter()
    story = train(recipe, folder, seed=0)
    return time.perf_counter() - begun, [loss for _, loss in story.curve]


def theirs(lm: Any, rows: list[list[int]], folder: Path) -> tuple[float, list[float]]:
    arguments = hf.TrainingArguments(
        str(folder),
        max_steps=STEPS,
        learning_rate=RATE,
        seed=0,
        per_device_train_batch_size=ROWS,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = objective.as_trainer(language_model, lm, rows, arguments)
    trainer.remove_callback(hf.PrinterCallback)
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    return seconds, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def main() -> None:
    lm = subject()
    drawn = torch.randint(2048, (64, LENGTH), generator=torch.Generator().manual_seed(0))
    rows = drawn.tolist()
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            spent, losses = ours(lm, rows, Path(folder))
            other, same = theirs(lm, rows, Path(folder))
        seconds["ours"].append(spent)
        seconds["theirs"].append(other)
        gap = max(abs(a - b) for a, b in zip(losses, same, strict=True))
        if gap > 1e-5:
            raise SystemExit(f"the losses differ by {gap}")
    speed = {name: STEPS * ROWS * LENGTH / min(rounds) for name, rounds in seconds.items()}
    ratio = speed["ours"] / speed["theirs"]
    click.echo(
        f"ours {speed['ours']:.0f} tokens/s, Trainer {speed['theirs']:.0f}: ratio {ratio:.2f}"
    )
    click.echo(f"losses of {STEPS} steps equal to {gap:.1e}")
    found = {"tokens_per_second": {n: round(x) for n, x in speed.items()}, "ratio": round(ratio, 3)}
    found |= {"largest_gap_of_losses": gap, "threads": torch.get_num_threads()}
    found |= {"versions": {"torch": torch.__version__, "transformers": hf.__version__}}
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
