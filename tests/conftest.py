"""Check every shape and type annotation of stratoscope while its tests run, on one thread for each
process."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import jaxtyping
import pytest

from support import changed, seconds, skips, typed

# torch reads this when it is first imported, which may be never: this file does not import it.
# One thread: the tests run in as many processes as there are cores (make test), and tensors are
# tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")

typed.install("stratoscope")


STARTED = pytest.StashKey[float]()
SECONDS: Counter[str] = Counter()  # of CPU, by test file


def _cpu() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[STARTED] = _cpu()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, value in report.user_properties:
        if name == "cpu" and report.when == "teardown":
            SECONDS[report.nodeid.partition("::")[0]] += value


def pytest_sessionfinish(session: pytest.Session) -> None:
    """`--record-seconds`: the files that ran are written into the table, the others stay."""
    if not session.config.getoption("--record-seconds") or hasattr(session.config, "workerinput"):
        return
    table = seconds.read() | {file: round(spent, 1) for file, spent in SECONDS.items()}
    seconds.write({file: s for file, s in table.items() if (seconds.ROOT / file).is_file()})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    """A skip for a reason that `support/skips.py` does not list is a failure."""
    if call.when == "teardown":
        item.user_properties.append(("cpu", _cpu() - item.stash.get(STARTED, _cpu())))
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not skips.allowed(reason):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} is skipped for a reason that no list has: {reason}"
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-seconds", action="store_true", help="write support/seconds.tsv")
    parser.addoption(
        "--method",
        action="append",
        default=[],
        help="in the suites that run all methods: only the cases of this one (ROOM.NAME)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`--method`: of tests that take the address of a method, those of other methods are left."""
    if not (chosen := set(config.getoption("--method"))):
        return
    left = [item for item in items if _address(item) not in chosen | {None}]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if _address(item) in chosen | {None}]


def _address(item: pytest.Item) -> str | None:
    given = getattr(item, "callspec", None)
    if given is None or item.nodeid.partition("::")[0] not in changed.ALL_METHODS:
        return None
    entry = given.params.get("entry")
    return given.params.get("address") or getattr(entry, "address", None)


@pytest.fixture(scope="module")
def without_type_checks() -> Iterator[None]:
    """For what runs every method: under beartype it takes ten times as long, and each method's own
    tests run under it anyway."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
