"""Predicates as a model writes them, `AuthorOf(Hamlet, Shakespeare) ∧ ¬IsBook(Hamlet)`, read into
names and arguments, and joined to a graph."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import networkx as nx

_OPENING = re.compile(r"(?P<no>[¬~!]|\bnot\s)?\s*(?P<name>[A-Za-z]\w*)?\(")


class Predicate(NamedTuple):
    """name(arguments), or that it does not hold."""

    name: str
    arguments: tuple[str, ...]
    negated: bool = False


def parse(text: str, negated: bool = False) -> list[Predicate]:
    """The predicates of a text, in order; what is not closed, or has no argument, is left out.

    A negated bracket negates all in it. A predicate as an argument is one of its own, and stands in
    the outer one as its first argument.
    """
    found: list[Predicate] = []
    at = 0
    while match := _OPENING.search(text, at):
        end = _closing(text, match.end() - 1)
        if end < 0:
            at = match.end()
            continue
        inside, no = text[match.end() : end], negated != bool(match["no"])
        at = end + 1
        if not match["name"]:
            found += parse(inside, no)
            continue
        inner: list[Predicate] = []
        arguments = []
        for part in _parts(inside):
            nested = parse(part) if "(" in part else []
            inner += nested
            arguments.append(nested[0].arguments[0] if nested else part.strip(" \t\n\"'."))
        if arguments := [argument for argument in arguments if argument]:
            found.append(Predicate(match["name"], tuple(arguments), no))
        found += inner
    return found


def graph(predicates: Iterable[Predicate]) -> nx.MultiDiGraph:
    """Arguments as nodes, in small letters; an edge from the first of a predicate to each other,
    with its `relation` and whether it is `negated`. IsCity(Paris) goes from "paris" to "city" by
    "is"."""
    made = nx.MultiDiGraph()
    for name, arguments, negated in predicates:
        first, *others = (plain(argument) for argument in arguments)
        relation = name
        if not others:
            kind = re.sub(r"^(is|has)(?=[A-Z_])", "", name, flags=re.IGNORECASE)
            relation, others = "is", [plain(re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", kind))]
        for other in others:
            if not made.has_edge(first, other, key=(relation, negated)):
                made.add_edge(
                    first, other, key=(relation, negated), relation=relation, negated=negated
                )
    return made


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _closing(text: str, opening: int) -> int:
    """Where the bracket is closed; -1 where it is not."""
    depth = 0
    for at in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return -1


def _parts(text: str) -> list[str]:
    """Cut at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
