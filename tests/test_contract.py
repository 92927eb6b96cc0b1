"""One suite for every method that the catalogue finds: what its verb promises holds on models of
several families.

How a verb is called says `EXAMPLE` in the method's own test (`tests/support/cases.py`). A method
may refuse a family, with a reason that `tests/support/skips.py` lists; a verb that runs on no
subject at all fails.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stratoscope import catalogue
from support import cases, laws, laws_made
from support.cases import SUBJECTS, Case

pytestmark = pytest.mark.usefixtures("without_type_checks")
METHODS = catalogue.methods()
VERBS = [(entry.address, verb) for entry in METHODS for verb in entry.verbs]
OF = {verb: [address for address, v in VERBS if v == verb] for _, verb in VERBS}
LAWS = {"measure", "fit", "edit", "build"}  # held below; support/laws_made.py has those to come

# a search of thousands of runs: by day on two subjects
DEAR = {"circuits.discover": ("planted", "llama")}
MEASURED = [
    pytest.param(address, name, marks=[pytest.mark.nightly] if night else [])
    for address in OF["measure"]
    for name in (*cases.DEFAULT, *cases.NIGHTLY)
    for night in [name in cases.NIGHTLY or name not in DEAR.get(address, (name,))]
]


@pytest.fixture(scope="module", autouse=True)
def _say_what_is_supported(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    writer = request.config.pluginmanager.get_plugin("terminalreporter")
    if writer and request.config.get_verbosity() > 0:
        writer.write_line("")
        for address, verb, name in sorted(cases.OUTCOMES):
            writer.write_line(
                f"{address:34} {verb:8} {name:9} {cases.OUTCOMES[address, verb, name]}"
            )


@pytest.mark.parametrize(("address", "name"), MEASURED)
def test_a_measure_is_whole_labelled_and_the_same_batched_or_single(
    address: str, name: str, tmp_path: Path
) -> None:
    case, result = cases.case(name), cases.supported(address, "measure", name)
    assert laws.labelled(result, address, case, tmp_path) == []
    assert laws.seeded(result, catalogue.module(address).measure) == []
    assert laws.batched(lambda part: cases.measure(address, part), result, case) == []


@pytest.mark.parametrize("address", OF["measure"])
def test_a_measure_is_repeatable_and_leaves_the_model_as_it_was_when_it_breaks(
    address: str,
) -> None:
    name = cases.runs_on(address) or "llama"
    case, result = cases.case(name), cases.supported(address, "measure", name)
    assert laws.repeatable(lambda part: cases.measure(address, part), result, case) == []
    [module] = case.lm.layout.writers(case.lm.layout.resolve_one("layers.1.mlp.out"))
    faults, ran = laws.interrupted(lambda: cases.measure(address, case), case.lm, module)
    assert faults == []
    assert ran, "it never ran the layer: what it leaves behind when it breaks is not known"


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("address", OF["edit"])
def test_an_edit_changes_outputs_inside_and_not_a_bit_afterwards(
    address: str, name: str, tmp_path: Path
) -> None:
    case = cases.case(name)
    cases.supported(address, "edit", name)

    def make() -> Any:
        return cases.call(address, "edit", case)

    assert laws.undone(make, lambda: logits(case), case.lm, tmp_path / "edit") == []


def logits(case: Case) -> torch.Tensor:
    return case.lm(case.inputs)["logits"].detach().clone()


@pytest.mark.parametrize("name", cases.FITTED)
@pytest.mark.parametrize("address", OF["fit"])
def test_a_fit_is_kept_bit_for_bit(address: str, name: str, tmp_path: Path) -> None:
    case, trains = cases.case(name), "folder" in options(address, "fit")
    cases.supported(address, "fit", name, **({"folder": tmp_path / "tried"} if trains else {}))

    def fit(folder: Path) -> Any:
        return cases.call(address, "fit", case, **({"folder": folder} if trains else {}))

    assert laws.kept(fit, case.lm, tmp_path) == []
    if trains:
        assert laws.resumed(fit, tmp_path) == []


OBJECTIVES = [e.address for e in METHODS if "\ndef loss(" in e.path.read_text("utf-8")]


@pytest.mark.parametrize("address", OBJECTIVES)
def test_an_objective_shows_no_target_and_ignores_padding(address: str, tmp_path: Path) -> None:
    name = cases.runs_on(address, "fit", folder=tmp_path / "fit") or "llama"
    case, method = cases.case(name), catalogue.module(address)
    rows = cases.example(address, "batch", case)["rows"]

    def other(labels: torch.Tensor) -> torch.Tensor:
        return torch.where(labels >= 0, (labels + 1) % 3, labels)

    faults = laws_made.objective(method.batch, method.loss, case.lm.model, rows, other=other)
    assert faults == []


@pytest.mark.parametrize("address", OF.get("build", []))
def test_what_is_built_is_proved_counted_and_opens_in_a_fresh_process(
    address: str, tmp_path: Path
) -> None:
    model = catalogue.module(address).build(**cases.example(address, "build", None))
    stated = cases.example(address, "built", None)
    assert laws_made.built(model, **stated) == []
    assert laws_made.reopened(model, stated["examples"][0], tmp_path) == []


@pytest.mark.parametrize(("address", "verb"), [pair for pair in VERBS if pair[1] != "build"])
def test_every_verb_is_held_to_its_law_on_some_subject(
    address: str, verb: str, tmp_path: Path
) -> None:
    folder = {"folder": tmp_path} if verb == "fit" and "folder" in options(address, verb) else {}
    name = cases.runs_on(address, verb, **folder)
    assert name is not None, {k: v for k, v in cases.OUTCOMES.items() if k[:2] == (address, verb)}


def options(address: str, verb: str) -> set[str]:
    return {*inspect.signature(getattr(catalogue.module(address), verb)).parameters}


# --- what a file says -----------------------------------------------------------------------------


def test_every_verb_has_its_law_here() -> None:
    assert {verb for _, verb in VERBS} <= LAWS, "hold it to its law here, with its first method"


@pytest.mark.parametrize("entry", METHODS, ids=lambda e: e.address)
def test_a_method_file_says_what_it_is(entry: catalogue.Entry) -> None:
    text = catalogue.docstring(entry.path.read_text("utf-8"))
    first = catalogue.summary(entry.path.read_text("utf-8"))
    assert first.endswith("."), "the first paragraph is one sentence"
    assert ". " not in first
    assert re.search(r"^Paper: \S", text, re.MULTILINE)
    assert entry.paper
    flat = " ".join(text.split())
    assert "Reads as" in flat
    assert "oes not show" in flat


SETTINGS = {"build": {inspect.Parameter.VAR_KEYWORD}}  # those of the config
FIRST: dict[str, list[str]] = {
    "measure": ["lm", "inputs"],
    "fit": ["lm", "inputs"],
    "edit": ["lm", "request"],
    "build": ["config"],
}


@pytest.mark.parametrize(("address", "verb"), VERBS)
def test_options_are_named_few_and_explained(address: str, verb: str) -> None:
    function: Any = getattr(catalogue.module(address), verb)
    parameters = list(inspect.signature(function).parameters.values())
    count = len(FIRST[verb])
    assert [p.name for p in parameters[:count]] == FIRST[verb]
    kinds = {p.kind for p in parameters[count:]}
    assert kinds <= {inspect.Parameter.KEYWORD_ONLY} | SETTINGS.get(verb, set())
    assert sum(p.default is not p.empty for p in parameters[count:]) <= 8  # the rest are data
    assert inspect.getdoc(function)
