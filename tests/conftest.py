"""Check every shape and type annotation of stratoscope while its tests run, on one thread for each
process."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import Any

import jaxtyping
import pytest

from support import changed, skips

# torch reads this when it is first imported, which may be never: this file does not import it.
# One thread: the tests run in as many processes as there are cores (make test), and tensors are
# tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")

jaxtyping.install_import_hook("stratoscope", "beartype.beartype")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """A skip for a reason that `support/skips.py` does not list is a failure."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not skips.allowed(reason):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} is skipped for a reason that no list has: {reason}"
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
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
