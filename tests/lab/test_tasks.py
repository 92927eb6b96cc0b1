"""Tasks fit the tokenizer they are drawn for, ask what they say, refuse what they cannot, and count
right."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from stratoscope.errors import InputError
from stratoscope.lab import planted, tasks
from stratoscope.lab.tasks import Task, capitals, laundry_list, mcq, needle, sums, two_hops
from stratoscope.lab.tasks._task import Pair, fitted, made, next_token
from stratoscope.models import wrap

EVERY = tasks.names()
SMOLLM2 = (
    Path(os.environ.get("STRATOSCOPE_CACHE", Path.home() / ".cache" / "stratoscope"))
    / "models"
    / "smollm2"
)
needs_smollm2 = pytest.mark.skipif(
    not SMOLLM2.is_dir(), reason="the tokenizer of SmolLM2 is not in the cache"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    if not SMOLLM2.is_dir():
        pytest.skip("the tokenizer of SmolLM2 is not in the cache")
    return AutoTokenizer.from_pretrained(SMOLLM2)


def whole_words(words: list[str], unknown: str | None = "?") -> PreTrainedTokenizerFast:
    """One token for each word between spaces."""
    ids = {
        word: index
        for index, word in enumerate(dict.fromkeys([*([unknown] if unknown else []), *words]))
    }
    model = Tokenizer(WordLevel(ids, unk_token=unknown) if unknown else WordLevel(ids))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token=unknown)


def test_tasks_are_the_files_of_the_folder() -> None:
    files = {path.stem for path in Path(tasks.__file__).parent.glob("[!_]*.py")}
    assert {"ioi", "two_hops"} <= files == {*EVERY}
    with pytest.raises(InputError, match="no task 'ioy'; nearest: ioi"):
        tasks.task("ioy")
    with pytest.raises(InputError, match="no task '_task'"):
        tasks.task("_task")


# --- every task, under a real tokenizer -----------------------------------------------------------


def read(tokenizer: PreTrainedTokenizerBase, prompt: str | tuple[int, ...]) -> list[int]:
    return tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)


@pytest.mark.parametrize("name", EVERY)
def test_pairs_are_aligned_and_answers_are_the_next_token(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = tasks.task(name)(tokenizer, 40, 3)
    assert made.name == name
    assert (
        len(made)
        == len(made.clean)
        == len(made.corrupt)
        == len(made.answers)
        == len(made.foil_ids)
        == 40
    )
    assert made.chance == 0.5
    assert made.story
    assert made.source
    for clean, corrupt, *words, answer, foil in zip(
        made.clean, made.corrupt, made.answers, made.foils, made.answer_ids, made.foil_ids
    ):
        first, second = read(tokenizer, clean), read(tokenizer, corrupt)
        assert len(first) == len(second)
        assert first != second
        assert answer != foil
        assert [tokenizer.decode([answer]), tokenizer.decode([foil])] == words
        if isinstance(clean, str):  # whole texts, tokenized whole
            assert read(tokenizer, clean + words[0]) == [*first, answer]
            assert read(tokenizer, corrupt + words[1]) == [*second, foil]
            assert not clean.endswith(" ")


@pytest.mark.parametrize("name", EVERY)
def test_draws_differ_and_are_the_same_for_the_same_seed(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    write = tasks.task(name)
    made = write(tokenizer, 60, 1)
    assert len(set(zip(made.clean, made.corrupt))) == 60
    assert made == write(tokenizer, 60, 1)
    assert made.clean[:7] == write(tokenizer, 7, 1).clean
    assert made.clean != write(tokenizer, 60, 2).clean
    assert len(set(made.answers)) > 1
    with pytest.raises(InputError, match=f"{name}: 0 prompt pairs"):
        write(tokenizer, 0)


@pytest.mark.parametrize("name", sorted({*EVERY} - {"greater_than"}))
def test_the_answer_cannot_be_told_from_the_foil_without_the_prompt(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A guesser with one fixed preference among all answers is right about half the time: chance is
    what it says."""
    made = tasks.task(name)(tokenizer, 400, 0)
    for trial in range(3):
        generator = random.Random(trial)
        liking = {token: generator.random() for token in sorted({*made.answer_ids, *made.foil_ids})}
        right = [
            liking[answer] > liking[foil] for answer, foil in zip(made.answer_ids, made.foil_ids)
        ]
        assert abs(np.mean(right) - made.chance) < 0.12, trial


# --- each task asks what it says ------------------------------------------------------------------


def rule_ioi(prompt: str) -> str:
    words = [word.strip(".,") for word in prompt.split()]
    names = [word for word in words if word in tasks.ioi.NAMES]
    (once,) = [name for name in names if names.count(name) == 1]
    assert len(names) == 3
    return f" {once}"


def rule_capitals(prompt: str) -> str:
    (country,) = [country for country in capitals.CAPITALS if f" {country} " in prompt]
    return f" {capitals.CAPITALS[country]}"


def rule_arithmetic(prompt: str) -> str:
    *shown, asked = prompt.split("\n")
    for line in shown:
        left, total = line.split("=")
        assert sum(map(int, left.split("+"))) == int(total)
    return str(sum(map(int, asked.rstrip("=").split("+"))))


def rule_colored_objects(prompt: str) -> str:
    asked = prompt.split("What color is the ")[1].split("?")[0]
    return f" {prompt.split(f' {asked}')[0].split()[-1]}"


def rule_docstring(prompt: str) -> str:
    signature = prompt.split("(self, ")[1].split(")")[0].split(", ")
    return f" {signature[prompt.count(':param ')]}"


def rule_mcq(prompt: str) -> str:
    question, *options = prompt.split("\n")[:5]
    right = mcq.QUESTIONS[question.removeprefix("Question: ")][0].split()
    (label,) = [line.split(". ")[0] for line in options if line.split(". ")[1] in right]
    return f" {label}"


def test_multiple_choice_in_order_after_solved_questions(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    made = mcq.task(tokenizer, 60, 4, ordered=True, shots=3)
    before = made.clean[0].rpartition("\n\n")[0]
    solved = before.split("\n\n")
    said = [text.partition("Answer:")[2] for text in solved]
    assert said == [rule_mcq(text) for text in solved]
    assert len({*said}) == 3  # none of them is the answer twice
    for clean, corrupt, answer, foil in zip(made.clean, made.corrupt, made.answers, made.foils):
        asked, other = (text.removeprefix(f"{before}\n\n") for text in (clean, corrupt))
        assert [line[:3] for line in asked.split("\n")[1:5]] == ["A. ", "B. ", "C. ", "D. "]
        assert (rule_mcq(asked), rule_mcq(other)) == (answer, foil)
    assert {*made.answers} == {*made.foils} == {" A", " B", " C", " D"}
    assert "3 solved questions" in made.story
    with pytest.raises(InputError, match="shots=-1"):
        mcq.task(tokenizer, 4, shots=-1)
    letters = [prompt.split("\n")[1][0] for prompt in mcq.task(tokenizer, 60, 4).clean]
    assert len({*letters}) > 10


def rule_laundry_list(prompt: str) -> str:
    listed, again = prompt.split(". ")[:2]
    things = [part.split()[-1] for part in listed.split(",")]
    (left,) = [thing for thing in things if f"the {thing}" not in again]
    return f" {left}"


def rule_two_hops(prompt: str) -> str:
    described = prompt.removesuffix(" is").split("the country where ")[1]
    (country,) = [name for name, words in two_hops.WHERE.items() if described in words]
    relation = two_hops.CAPITALS if "capital" in prompt else two_hops.LANGUAGES
    return f" {relation[country]}"


def test_a_laundry_list_may_be_long(tokenizer: PreTrainedTokenizerBase) -> None:
    made = laundry_list.task(tokenizer, 60, 4, sizes=range(5, 11))
    assert {prompt.split(". ")[0].count(",") + 1 for prompt in made.clean} == {*range(5, 11)}
    assert [rule_laundry_list(prompt) for prompt in made.clean] == list(made.answers)
    assert [rule_laundry_list(prompt) for prompt in made.corrupt] == list(made.foils)
    with pytest.raises(InputError, match="at least three things"):
        laundry_list.task(tokenizer, 4, sizes=(2, 5))


def rule_needle(prompt: str) -> str:
    (place,) = [place for place in needle.PLACES if f"at the {place}?" in prompt]
    return f" {prompt.split(f'lives in the {place} is the ')[1].split()[0]}"


def test_needles_are_different_and_asked_for_in_other_words(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    found = needle.needles(tokenizer, 80, 3)
    assert len({*found}) == 80
    assert found == needle.needles(tokenizer, 80, 3)
    assert found != needle.needles(tokenizer, 80, 4)
    for statement, answer, question in found:
        assert next_token(tokenizer, statement, answer) is not None
        ids = [tokenizer(part)["input_ids"] for part in (statement, question)]
        assert ids[0][-1] != ids[1][-1]
        # the question holds no two words of the needle in a row, but for the place and its article
        runs = [{*zip(row, row[1:], row[2:])} for row in ids]
        assert not runs[0] & runs[1], (statement, question)
    with pytest.raises(InputError, match="10000 needles were asked for"):
        needle.needles(tokenizer, 10_000)
    with pytest.raises(InputError, match=r"depth=2\.0"):
        needle.task(tokenizer, 4, depth=2.0)
    early, late = (needle.task(tokenizer, 4, 1, depth=depth).clean[0] for depth in (0.0, 1.0))
    assert early.index("lives in") < 30
    assert late.index("lives in") > 300


def rule_sums(prompt: str) -> str:
    *shown, asked = prompt.split("\n")
    assert len(shown) == 4
    for line in shown:
        a, b, c = (int(n) for n in line.replace("=", "+").split("+"))
        assert a + b == c
        assert c != sum(int(n) for n in asked.rstrip("=").split("+"))
    return str(sum(int(n) for n in asked.rstrip("=").split("+")))


@pytest.mark.parametrize("words", [False, True])
def test_differences_in_digits_and_in_words(
    words: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = sums.task(tokenizer, 40, 1, operation="-", shots=3, words=words, half=1)
    numbers = {name: n for n, name in enumerate(sums.NUMBERS)}
    halves = [{*sums.problems("-", half)} for half in (0, 1)]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == {*sums.problems("-")}
    for prompt, answer in (*zip(made.clean, made.answers), *zip(made.corrupt, made.foils)):
        rows = []
        for line in [*prompt.split("\n")[:-1], f"{prompt.split(chr(10))[-1]}{answer}"]:
            parts = line.split()[::2] if words else line.replace("=", "-").split("-")
            rows.append([numbers[part] if words else int(part) for part in parts])
        assert len(rows) == 4
        assert all(a - b == c for a, b, c in rows)
        assert all((a, b) in halves[0] and c != rows[-1][2] for a, b, c in rows[:-1])
        assert tuple(rows[-1][:2]) in halves[1]
    for wrong in ({"operation": "*"}, {"half": 2}):
        with pytest.raises(InputError, match=r"'\+' or '-'"):
            sums.task(tokenizer, 4, **wrong)


def rule_pronoun(prompt: str) -> str:
    return " she" if any(name in prompt.split() for name in tasks.pronoun.SHE) else " he"


def rule_agreement(prompt: str) -> str:
    plural = prompt.split()[1].endswith("s")
    return " are, were, have" if plural else " is, was, has"


RULES: dict[str, Callable[[str], str]] = {
    name.removeprefix("rule_"): rule for name, rule in globals().items() if name.startswith("rule_")
}


@pytest.mark.parametrize("name", sorted(RULES))
def test_answers_follow_the_rule_written_a_second_time(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = tasks.task(name)(tokenizer, 60, 4)
    for clean, corrupt, answer, foil in zip(made.clean, made.corrupt, made.answers, made.foils):
        assert answer.strip() in RULES[name](clean).strip().split(", "), clean
        assert foil.strip() in RULES[name](corrupt).strip().split(", "), corrupt


def test_induction_repeats(tokenizer: PreTrainedTokenizerBase) -> None:
    made = tasks.induction.task(tokenizer, 30)
    for clean, corrupt, answer, foil in zip(
        made.clean, made.corrupt, made.answer_ids, made.foil_ids
    ):
        for prompt, token in ((clean, answer), (corrupt, foil)):
            first = prompt[: prompt.index(prompt[-1]) + 1]
            assert prompt[-len(first) :] == first
            assert prompt[len(first)] == token
        assert sum(one != other for one, other in zip(clean, corrupt)) == 1
        assert not {*clean, *corrupt} & {*tokenizer.all_special_ids}


def test_greater_than_compares_years(tokenizer: PreTrainedTokenizerBase) -> None:
    made = tasks.greater_than.task(tokenizer, 60)
    for clean, corrupt, answer, foil in zip(made.clean, made.corrupt, made.answers, made.foils):
        start, end = (word for word in clean.split() if word.isdigit())
        assert start[:2] == end
        assert int(foil) < int(start[2]) < int(answer)  # SmolLM2 writes digits singly
        assert corrupt == clean.replace(start, f"{end}01")


def test_greater_than_takes_two_digits_where_they_are_one_token() -> None:
    words = [*tasks.greater_than.NOUNS, "The", "lasted", "from", "the", "year", "to"]
    ids = {word: i for i, word in enumerate(["?", *words, *(f"{n:02d}" for n in range(100))])}
    model = Tokenizer(WordLevel(ids, unk_token="?"))
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Sequence, Split

    model.pre_tokenizer = Sequence([WhitespaceSplit(), Split(Regex(r"\d\d"), "isolated")])
    made = tasks.greater_than.task(
        PreTrainedTokenizerFast(tokenizer_object=model, unk_token="?"), 30
    )
    for clean, answer, foil in zip(made.clean, made.answers, made.foils):
        start = next(word for word in clean.split() if word.isdigit())
        assert 1 < int(foil) < int(start[2:]) < int(answer) < 99


# --- what a tokenizer cannot do -------------------------------------------------------------------

REFUSED = {
    "agreement": "nouns, in both numbers: 0 of 10",
    "arithmetic": "no prompt pair fits this tokenizer. .*some words are unknown",
    "capitals": "capitals: 0 of 41",
    "colored_objects": "colours: 0 of 8",
    "docstring": "names of parameters: 0 of",
    "greater_than": "nouns: 0 of",
    "induction": "ordinary tokens: 2 of 3 .* 13 are needed",
    "ioi": "names: 0 of 30 are single tokens under this tokenizer, and 4 are needed",
    "laundry_list": "things: 0 of",
    "mcq": "labels: 0 of 26",
    "needle": "animals: 0 of 20",
    "pronoun": "women's names: 0 of",
    "sums": "no prompt pair fits this tokenizer. .*some words are unknown",
    "two_hops": "two-hop questions: 0 of",
}


@pytest.mark.parametrize("name", EVERY)
def test_a_tokenizer_without_the_words_is_refused_by_the_list(name: str) -> None:
    with pytest.raises(InputError, match=REFUSED[name]):
        tasks.task(name)(whole_words(["the", "tea"]), 4)


def test_too_few_words_are_counted() -> None:
    with pytest.raises(InputError, match=r"names: 2 of 30 .* 4 are needed"):
        tasks.ioi.task(whole_words(["the", "Mary", "John"]), 4)


def test_a_tokenizer_that_fails_on_unknown_words_is_refused_too() -> None:
    with pytest.raises(InputError, match="cannot read 'the"):
        tasks.ioi.task(whole_words(["tea"], unknown=None), 4)


def test_pairs_that_do_not_fit_are_left_out_and_few_are_repeated() -> None:
    words = whole_words(["a", "b", "c", "d", "the"])
    ends = {"story": "s", "source": "t"}
    choices = [
        Pair("a", "b", " c", " d"),
        Pair("a a", "b", " c", " d"),
        Pair("a", "c", " b b", " d"),
    ]
    choices += [Pair("b", "a", " d", " d"), Pair("a", "d", " e", " b"), Pair("e", "a", " c", " d")]
    only = fitted("few", words, 5, 0, lambda generator: generator.choice(choices), **ends)
    assert set(only.clean) == {"a"}
    assert set(only.corrupt) == {"b"}
    assert (only.answers, only.foils) == (("c",) * 5, ("d",) * 5)
    for wrong, why in zip(
        choices[1:], ("has 2 tokens", "' b b' is not one", "same token", "' e' is not", "unknown")
    ):
        with pytest.raises(InputError, match=f"few: no prompt pair fits this tokenizer. .*{why}"):
            fitted("few", words, 1, 0, lambda generator, wrong=wrong: wrong, **ends)


def test_next_token_wants_the_prompt_to_stay(tokenizer: PreTrainedTokenizerBase) -> None:
    assert next_token(tokenizer, "The capital is", " Paris") == tokenizer(" Paris")["input_ids"][0]
    assert next_token(tokenizer, "The cap", "ital") is None  # would become another word
    assert next_token(tokenizer, "The", " Reykjavikian") is None
    first = next_token(whole_words(["the", "tea"], unknown=None), "tea", " the")
    assert first == 0  # id 0 is a token like any other


# --- accuracy -------------------------------------------------------------------------------------


def planted_task(p: planted.Planted, wrong: int) -> Task:
    """20 pairs of a planted model; in the last `wrong` of them answer and foil are exchanged."""
    ids, rows = p.tokenizer.get_vocab(), []
    for number, pair in enumerate(p.variants(20)):
        ends = (ids[pair.answer], ids[pair.foil])
        rows.append((pair.clean, pair.corrupt, *(ends if number < 20 - wrong else ends[::-1])))
    return made(p.name, p.tokenizer, rows, "story", "source")


@pytest.mark.parametrize("wrong", [0, 5, 20])
@pytest.mark.parametrize(
    "p", [planted.indirect_object(), planted.induction()], ids=lambda p: p.name
)
def test_accuracy_on_a_model_that_is_always_right(p: planted.Planted, wrong: int) -> None:
    lm, task = wrap(p.model, p.tokenizer), planted_task(p, wrong)
    found = tasks.accuracy(lm, task)
    share = (20 - wrong) / 20
    assert found.accuracy == found.top_accuracy == found.shift_accuracy == share
    assert found.chance == 0.5
    # Wilson's interval in closed form
    z = 1.959963984540054
    middle, spread = share + z * z / 40, z * math.sqrt(share * (1 - share) / 20 + z * z / 1600)
    assert float(found.accuracy_low) == pytest.approx(
        (middle - spread) / (1 + z * z / 20), abs=1e-9
    )
    assert float(found.accuracy_high) == pytest.approx(
        (middle + spread) / (1 + z * z / 20), abs=1e-9
    )
    assert found.correct.values.tolist() == [True] * (20 - wrong) + [False] * wrong
    assert found.answer.values.tolist() == list(task.answers)
    with torch.no_grad():  # plain Hugging Face, one prompt at a time
        for number in (0, 7, 19):
            for prompts, variable in (
                (task.clean, "clean_difference"),
                (task.corrupt, "corrupt_difference"),
            ):
                logits = p.model(**p.tokenizer(prompts[number], return_tensors="pt")).logits[0, -1]
                expected = float(logits[task.answer_ids[number]] - logits[task.foil_ids[number]])
                assert float(found[variable][number]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_accuracy_does_not_depend_on_the_batch(batch: int) -> None:
    p = planted.suppression()
    lm, task = wrap(p.model, p.tokenizer), planted_task(p, 4)
    found, whole = tasks.accuracy(lm, task, batch=batch), tasks.accuracy(lm, task)
    assert found.accuracy == whole.accuracy == 0.8
    assert np.allclose(found.clean_difference, whole.clean_difference, atol=1e-4)
    with pytest.raises(InputError, match="batch=0"):
        tasks.accuracy(lm, task, batch=0)


def test_accuracy_of_a_constant_preference_is_seen_through_by_the_shift() -> None:
    """A copier asked the same word each time: right on all, but the corrupt prompt changes
    nothing."""
    p = planted.previous_token_head()
    ids = p.tokenizer.get_vocab()
    rows = [("elm oak fen", "elm oak fen", ids["oak"], ids["sand"])] * 4
    found = tasks.accuracy(wrap(p.model, p.tokenizer), made("same", p.tokenizer, rows, "", ""))
    assert found.accuracy == 1
    assert found.shift_accuracy == 0


def test_accuracy_reads_ids_as_well_as_text() -> None:
    p = planted.induction()
    pairs, ids = p.variants(6), p.tokenizer.get_vocab()
    as_ids = lambda prompt: tuple(ids[word] for word in prompt.split())  # noqa: E731
    rows = [(as_ids(v.clean), as_ids(v.corrupt), ids[v.answer], ids[v.foil]) for v in pairs]
    assert (
        tasks.accuracy(wrap(p.model, p.tokenizer), made("ids", p.tokenizer, rows, "", "")).accuracy
        == 1
    )


# Floors written before the first measurement: what a 135M model that was trained on text and code
# must manage.
FLOORS = {"ioi": 0.8, "capitals": 0.8, "induction": 0.9}


@pytest.mark.real
@needs_smollm2
@pytest.mark.parametrize("name", sorted(FLOORS))
def test_smollm2_can_do_it(name: str) -> None:
    from stratoscope.models import load

    lm = load("smollm2")
    found = tasks.accuracy(lm, tasks.task(name)(lm.tokenizer, 32))
    assert float(found.accuracy) >= FLOORS[name]
    assert float(found.accuracy_low) > float(found.chance)
