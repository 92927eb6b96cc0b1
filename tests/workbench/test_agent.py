"""What an agent may ask, what it is told, and that it reaches no file that it was not given."""

from __future__ import annotations

import asyncio
import re

import click
import pytest

import stratoscope
from stratoscope import catalogue
from stratoscope.cli import main
from stratoscope.errors import StratoscopeError
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.workbench import skill
from stratoscope.workbench.agent import Agent
from stratoscope.workbench.desk import Desk
from stratoscope.workbench.server import server

TRUTH = planted.fact_lookup()
PATCHING = "heads.activation_patching"
WORDS = {"answer": TRUTH.answer, "foil": TRUTH.foil}


@pytest.fixture(scope="module")
def agent(tmp_path_factory) -> Agent:
    desk = Desk(["planted"], lambda _: wrap(TRUTH.model, TRUTH.tokenizer))
    return Agent(desk, tmp_path_factory.mktemp("results"))


def test_a_method_is_found_described_and_run(agent) -> None:
    assert "heads.activation_patching: " in agent.methods("patching")
    assert len(agent.methods().splitlines()) == sum(
        "measure" in entry.verbs for entry in catalogue.methods()
    )
    told = agent.describe("heads.activation_patching")
    assert "- corrupt: Any" in told or "- corrupt" in told
    assert "- save" not in told
    text = agent.measure(
        "heads.activation_patching", [TRUTH.clean], options={"corrupt": TRUTH.corrupt, **WORDS}
    )
    assert "beyond chance" in text
    assert "Does not show: " in text
    words = agent.measure("neurons.vocabulary", units=[list(sorted(TRUTH.neurons)[0])], top=1)
    assert TRUTH.answer.strip() in words or "promoted" in words


def test_an_explanation_in_sentences(agent) -> None:
    text = agent.explain(TRUTH.clean, **WORDS)
    assert text.startswith("Next token: ")
    assert "Top neurons: Neuron" in text
    assert "Does not show: " in text
    assert "Not measured: " in text
    assert "patching" in text.partition("Not measured: ")[2]  # quick, and it says so


def test_a_change_stands_beside_chance(agent) -> None:
    layer, number = sorted(TRUTH.neurons)[0]
    strong = agent.change(TRUTH.clean, f"L{layer}N{number}", strength=2.0, **WORDS)
    assert re.search(r"Chance: 8 others of its layer, off, reach", strong)
    off = next(line for line in strong.splitlines() if line.startswith("switched off"))
    assert "within chance" not in off
    idle = agent.change(TRUTH.clean, f"L{layer}N{number + 1}", **WORDS)
    assert re.search(r"^switched off.*within chance", idle, re.M)


def test_papers_and_their_words(agent) -> None:
    text = agent.papers("retrieval heads")
    assert re.search(r"^retrieval-heads: .*\[(reproduced|direction only|not|no|built)", text, re.M)
    assert "No paper speaks of" in agent.papers("quetzalcoatl")


@pytest.mark.parametrize(
    ("tool", "given"),
    [
        ("measure", {"method": PATCHING, "prompts": ["x"], "options": {"save": "/tmp/x"}}),
        ("measure", {"method": PATCHING, "prompts": ["x"]}),
        ("measure", {"method": "layers.logit_lens"}),
        ("measure", {"method": "layers.logit_lens", "prompts": ["x"], "top": 10**6}),
        ("measure", {"method": "editing.clamp", "prompts": ["x"]}),
        ("measure", {"method": "os.system", "prompts": ["x"]}),
        ("measure", {"method": "layers.logit_lens", "prompts": [TRUTH.clean], "model": "/etc"}),
        ("describe", {"method": "layers.nothing"}),
        ("change", {"prompt": TRUTH.clean, "unit": "L99H0"}),
        ("explain", {"prompt": " "}),
        ("open_result", {"name": "../secret.nc"}),
        ("open_result", {"name": "/etc/passwd"}),
    ],
)  # fmt: skip
def test_a_refusal_is_a_sentence_and_an_error(agent, tool, given) -> None:
    with pytest.raises(StratoscopeError):
        getattr(agent, tool)(**given)


def test_a_saved_result_is_told(agent) -> None:
    from stratoscope import results
    from stratoscope.tokens import next_token

    lm, _ = agent.desk.lanes("planted")
    assert "no result" in agent.results()
    results.save(next_token.measure(lm.lm, TRUTH.clean), agent.folder / "next.nc")
    assert agent.results() == "next.nc"
    assert "tokens.next_token: probability" in agent.open_result("next.nc")


def test_the_server_lists_every_tool_as_read_only_and_runs_it(agent, capsys) -> None:
    made = server(agent)
    tools = asyncio.run(made.list_tools())
    assert [tool.name for tool in tools] == [tool.__name__ for tool in agent.tools]
    assert all(tool.annotations.read_only_hint for tool in tools)
    assert all(tool.description for tool in tools)
    properties = next(t for t in tools if t.name == "measure").input_schema["properties"]
    assert {"method", "prompts", "options"} <= set(properties)
    given = {"method": "layers.logit_lens", "prompts": [TRUTH.clean]}
    found = asyncio.run(made.call_tool("measure", given))
    assert "layers.logit_lens" in found.content[0].text
    assert capsys.readouterr().out == ""
    assert "honest" in made.instructions


def test_the_skill_names_what_there_is(capsys) -> None:
    whole = skill.text()
    assert f"stratoscope {stratoscope.__version__}" in whole
    assert "VERSION" not in whole
    for room, name in re.findall(r"`(?:stratoscope measure )?([a-z]+)\.([a-z_]+)", whole):
        if room not in ("st", "results"):
            catalogue.find(f"{room}.{name}")
    commands = set(re.findall(r"stratoscope ([a-z]+)", whole)) - {"as", "import"}
    known = set(main.list_commands(click.Context(main)))
    assert commands - known <= {"st"}
    [code] = re.findall(r"```python\n(.+?)```", whole, re.S)
    compile(code, "SKILL.md", "exec")


@pytest.mark.real
def test_the_skills_lines_run(capsys) -> None:
    [code] = re.findall(r"```python\n(.+?)```", skill.text(), re.S)
    exec(compile(code, "SKILL.md", "exec"), {})
    out = capsys.readouterr().out
    assert "Beyond chance" in out
    assert "Does not show" in out
