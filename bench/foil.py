"""Does a foil of the answer's kind ask a sharper question than the runner-up?

    python bench/foil.py run         appends to bench/foil.jsonl, resumes; half an hour of one core
    python bench/foil.py table       writes docs/foil.md from what is there

`explain` compares the answer with a foil. (a) The runner-up: the most probable other token, often a
function word, and a corrupt prompt made for that pair. (b) The chosen foil: foil and corrupt prompt
together, a likely token of the answer's kind (`tokens.corruption` without a foil). The rule of (b)
was designed on six prompts about capitals, none of which is here.

Written before the run, and frozen with it: the 24 prompts below; SmolLM2-135M-Instruct; the answer
is the model's top token, right or wrong; default settings, seed 0. A question's number is its best
head's |effect| over the bound of its sweep (`heads.activation_patching`), and over the largest
|null| of one draw for each head. A question that a method refuses counts as one on which no head
exceeds, and has no ratio. Reported: on how many prompts some head exceeds; the median ratio; the
geometric mean of the ratios and of (b) over (a) with 95 % intervals over prompts. (b) is called
better if that last interval lies above 1, worse if below, else undecided.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

import stratoscope
from stratoscope.engine.metric import last_logits
from stratoscope.errors import StratoscopeError
from stratoscope.heads import activation_patching
from stratoscope.maths.resample import interval
from stratoscope.models import LM
from stratoscope.tokens import corruption

HERE = Path(__file__).parent
FOUND, PAGE = HERE / "foil.jsonl", HERE.parent / "docs" / "foil.md"
PROMPTS = {
    "facts": (
        "The chemical symbol for gold is",
        "The author of Romeo and Juliet is William",
        "The currency used in Japan is the",
        "The largest planet in the solar system is",
    ),
    "agreement": (
        "The pictures that the old man painted",
        "The teacher who helped the students",
        "The dogs near the fence",
        "My sister and my brother",
    ),
    "pronouns": (
        "The queen put on her crown because",
        "Robert lost his keys, so Anna helped",
        "The boys were hungry, so their mother cooked for",
    ),
    "translation": (
        "English: dog. French: chien. English: cat. French:",
        "The Spanish word for house is",
        "In German, the word for water is",
    ),
    "sequences": (
        "January, February, March,",
        "2, 4, 6, 8,",
        "red, orange, yellow, green,",
        "one two three four",
    ),
    "opposites": (
        "The opposite of hot is",
        "big and small, fast and slow, young and",
        "The door was not open; it was",
    ),
    "code": (
        "for i in range(10):\n    print(",
        "def square(number):\n    return number *",
        "import numpy as",
    ),
}
RULES = {"runner-up": "(a) the runner-up", "kind": "(b) the chosen foil"}
KEYS = ("bound", "null")


def question(lm: LM, prompt: str, rule: str) -> dict[str, Any]:
    """One prompt under one rule: which pair, the best head's effect, and what chance reaches."""
    answer, runner_up = last_logits(lm, prompt)[0].topk(2).indices.tolist()
    foil = runner_up if rule == "runner-up" else None
    made = corruption.measure(lm, prompt, answer=answer, foil=foil)
    words = {"answer": answer, "foil": int(made["foil_id"][0])}
    corrupt = [made["id"].values[0].tolist()]
    found = activation_patching.measure(lm, prompt, corrupt=corrupt, **words)
    return {
        "pair": [lm.tokenizer.decode([word]) for word in words.values()],
        "corrupt": lm.tokenizer.decode(corrupt[0]),
        "gap": [float(found[f"{side}_difference"][0]) for side in ("clean", "corrupt")],
        "effect": float(abs(found["effect"]).max()),
        "bound": float(found["bound"][0]),
        "null": float(abs(found["null"]).max()),
    }


@click.group()
def main() -> None:
    """The foil's rule on prompts that were not looked at when it was made."""


@main.command()
def run() -> None:
    """Measure what is not in bench/foil.jsonl yet."""
    lm = stratoscope.load("smollm2")
    done = {(line["prompt"], line["rule"]) for line in lines()}
    for kind, prompts in PROMPTS.items():
        for prompt, rule in ((p, r) for p in prompts for r in RULES):
            if (prompt, rule) in done:
                continue
            try:
                found = question(lm, prompt, rule)
            except StratoscopeError as error:
                found = {"refused": str(error)}
            with FOUND.open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"kind": kind, "prompt": prompt, "rule": rule} | found) + "\n"
                )


def lines() -> list[dict[str, Any]]:
    text = FOUND.read_text(encoding="utf-8") if FOUND.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


@main.command()
def table() -> None:
    """Print the page and write docs/foil.md."""
    PAGE.write_text(page(lines()), encoding="utf-8")
    click.echo(PAGE.read_text(encoding="utf-8"))


def page(found: list[dict[str, Any]]) -> str:
    by = {(line["prompt"], line["rule"]): line for line in found}
    prompts = list(dict.fromkeys(line["prompt"] for line in found))
    ratio = {
        key: np.array([[_ratio(by[prompt, rule], key) for rule in RULES] for prompt in prompts])
        for key in KEYS
    }
    rows = []
    for n, name in enumerate(RULES.values()):
        cells = [f"{name} | {int((ratio['bound'][:, n] > 1).sum())} of {len(prompts)}"]
        cells += [
            f"{np.nanmedian(ratio[key][:, n]):.2f} | {_mean(ratio[key][:, n])}" for key in KEYS
        ]
        rows.append(f"| {' | '.join(cells)} |")
    pairs = {key: ratio[key][:, 1] / ratio[key][:, 0] for key in KEYS}
    low, high = _interval(pairs["bound"])[1:3]
    said = "better than" if low > 1 else "worse than" if high < 1 else "not told apart from"
    each = [_row(prompt, by[prompt, "runner-up"], by[prompt, "kind"]) for prompt in prompts]
    return "\n".join(
        [
            "# The foil: the runner-up, or a token of the answer's kind\n",
            f"Made by `python bench/foil.py table`; do not edit. {len(prompts)} prompts of "
            f"{len(PROMPTS)} kinds that the rule",
            "was not designed on, SmolLM2-135M-Instruct. The ratio is the best head's effect over "
            "the bound of its sweep",
            "(what the largest of all heads reaches in 24 random draws), or over the largest of "
            "one draw for each head. Means are",
            "geometric, with 95 % intervals over prompts.\n",
            "| foil | some head exceeds the bound | median over the bound | mean | median over "
            "one draw | mean |",
            "|---|---|---|---|---|---|",
            *rows,
            f"\n**By the rule written before the run, the chosen foil is {said} the runner-up**: "
            f"(b) over (a) is {_mean(pairs['bound'])}",
            f"over the bound, {_mean(pairs['null'])} over one draw.\n",
            'It is kept all the same, for what it asks and not for what it finds: `" Mars"` asks '
            'what tells this planet from another, `" the"`',
            "asks what makes a name likely at all, and the report names the foil and the rule. A "
            "foil of one's own (`--foil`) is better than either.\n",
            "| prompt | (a) answer, foil | effect / bound | (b) answer, foil | effect / bound |",
            "|---|---|---|---|---|",
            *each,
            "",
        ]
    )


def _ratio(line: dict[str, Any], key: str) -> float:
    return line["effect"] / line[key] if "effect" in line else float("nan")


def _interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """The geometric mean and its interval; prompts that were refused are left out."""
    found = interval(np.log(ratios[np.isfinite(ratios)]))
    return tuple(float(np.exp(x)) for x in found[:3])


def _mean(ratios: np.ndarray) -> str:
    value, low, high = _interval(ratios)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _row(prompt: str, *both: dict[str, Any]) -> str:
    cells = [f"`{json.dumps(prompt)[1:-1]}`"]
    for line in both:
        if "refused" in line:
            cells += ["refused", ""]
        else:
            words = ", ".join(f"`{json.dumps(word, ensure_ascii=False)}`" for word in line["pair"])
            cells += [words, f"{line['effect']:.2f} / {line['bound']:.2f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
