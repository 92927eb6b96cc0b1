"""What an agent is told before it asks: the rules, and SKILL.md of this version."""

from __future__ import annotations

from pathlib import Path

RULES = """Rules that keep an answer honest:
1. Say the effect, what chance reaches, and the interval together. What is within chance is no
   finding; do not call it small, or suggestive: say that it was not told apart from chance.
2. Only a change of the model (patching, ablation, `change`) shows a cause. A lens, an attention
   pattern, a neuron's words and a direct contribution show what is there.
3. Repeat what the method does not show, where the question asks for it.
4. One prompt is one prompt. For a claim about the model measure many, and give the interval.
5. A foil and a corrupt prompt are choices: name those that were used.
6. `no test` of a paper means that nothing could be concluded, not that the paper is wrong."""


def text() -> str:
    """SKILL.md with the version that it speaks of, and the rules."""
    import stratoscope

    whole = (Path(__file__).parent / "SKILL.md").read_text("utf-8")
    return whole.replace("VERSION", stratoscope.__version__).replace("RULES", RULES)
