"""What a verdict was measured with, and whether that is still what stands here.

A verdict keeps eight characters for every module of stratoscope that was loaded when it was
measured: the hash of the module's syntax tree without comments, docstrings and layout, so that only
a change of what is computed makes a verdict stale. Of its own paper file it keeps the claim and
what the claim may call, not the other claims nor the words it is judged by. Pinned data and model
weights are hashes in those modules, and so are the recipes of miniatures.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import requires
from pathlib import Path
from typing import TYPE_CHECKING

from stratoscope import catalogue

if TYPE_CHECKING:
    from stratoscope.claims.verdict import Verdict

# rooms that show, list or judge: what they do changes no number that is measured
_SHOW = ("cli", "claims", "report", "plots", "papers", "catalogue", "errors")
_SHOW += ("_lazy", "_threads", "__main__")
_LIBRARIES = ("torch", "transformers")
CLAIM = "claim"  # the name under which the claim's own digest is kept


def loaded() -> dict[str, str]:
    """The digest of every module of stratoscope that is loaded now and computes something, by its
    name."""
    names = (
        name.removeprefix("stratoscope.") for name in sys.modules if name.startswith("stratoscope.")
    )
    return {
        name: digests for name in sorted(names) if not _shows(name) and (digests := of_module(name))
    }


def of_module(name: str) -> str:
    """The digest of a module (`engine.sweep`), or "" when there is none of that name."""
    base = catalogue.ROOT.joinpath(*name.split("."))
    path = next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)
    return _of_file(path) if path else ""


def of_claim(path: Path, name: str) -> str:
    """The digest of one claim of a paper file, with all that the file defines beside the other
    claims."""
    return _of_claim(path.read_text(encoding="utf-8"), name)


@cache
def _of_claim(text: str, name: str) -> str:
    tree = ast.parse(text)
    others = [node for node in tree.body if _is_claim(node) and getattr(node, "name", "") != name]
    tree.body = [node for node in tree.body if node not in others]
    for node in tree.body:
        if _is_claim(node) and isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    return _digest(tree)


def changed(verdict: Verdict, path: Path) -> list[str]:
    """Why a verdict about a claim of the paper file `path` is stale, in words; empty while it is
    not.

    A library counts when it is older than this package now asks for.
    """
    if not verdict.code:
        return ["it was kept before verdicts recorded their code"]
    digests = dict(verdict.code)
    own = digests.pop(CLAIM, "")
    moved = [f"the claim {verdict.claim}"] if own != of_claim(path, verdict.claim) else []
    moved += [name for name, digest in digests.items() if of_module(name) != digest]
    reasons = [f"{', '.join(moved[:4])}{' ...' if moved[4:] else ''} changed"] if moved else []
    old = [
        f"{name} was {verdict.versions[name]}, and {floor} is needed now"
        for name, floor in floors().items()
        if name in verdict.versions and _parts(verdict.versions[name]) < _parts(floor)
    ]
    return reasons + old


@cache
def floors() -> dict[str, str]:
    """The oldest version of torch and transformers that this package takes."""
    pattern = re.compile(rf"({'|'.join(_LIBRARIES)})\b.*>=\s*([\d.]+)")
    matches = (pattern.match(line) for line in requires("stratoscope") or ())
    return {match[1]: match[2] for match in matches if match}


def commit(root: Path | None = None) -> str:
    """The commit of this checkout, with `+` when the source differs from it; "" outside a checkout.

    Verdicts and registrations are no source: they are added to while claims are measured.
    """
    root = root or catalogue.ROOT.parents[1]
    git = ["git", "-C", str(root)]
    if not (root / ".git").exists():
        return ""
    excluded = [f":!src/stratoscope/papers/{name}" for name in ("verdicts", "registrations")]
    status = [*git, "status", "--porcelain", "--", "src", *excluded]
    try:
        head, dirty = (
            subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
            for words in ([*git, "rev-parse", "--short=12", "HEAD"], status)
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if dirty else "")


def machine() -> str:
    """Processor, its vector instructions, torch's threads, system and Python: what seconds and last
    digits depend on; and with the last digits, whatever a training made of them."""
    import torch

    threads = torch.get_num_threads()
    parts = [_processor(), torch.backends.cpu.get_cpu_capability()]
    parts += [f"{threads} thread{'s' if threads > 1 else ''}"]
    return ", ".join([*parts, platform.system(), f"Python {platform.python_version()}"])


def _processor() -> str:
    """`AMD EPYC x86_64`; its family alone where the system does not name it."""
    try:
        listed = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        listed = ""
    name = re.search(r"^model name\s*:\s*(.+)$", listed, re.M)
    return f"{name[1].strip()} {platform.machine()}" if name else platform.machine()


def _shows(name: str) -> bool:
    return name.split(".")[0] in _SHOW


@cache
def _of_file(path: Path) -> str:
    return _digest(ast.parse(path.read_text(encoding="utf-8")))


def _digest(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:8]


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _is_claim(node: ast.AST) -> bool:
    marks = getattr(node, "decorator_list", [])
    return any(
        isinstance(m, ast.Call) and ast.unparse(m.func).rpartition(".")[2] == "claim" for m in marks
    )


def _parts(version: str) -> tuple[int, ...]:
    numbers = version.partition("+")[0].split(".")
    return tuple(int(part) for part in numbers if part.isdigit())
