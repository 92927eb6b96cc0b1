"""An import hook: a package's functions check their own annotations while the tests run.

`jaxtyping.install_import_hook` does this too, and then half of the suite's time is its own: it
wraps every function in its bookkeeping of axis names, and every function within a function anew at
each call. Here what names an axis goes through `jaxtyping.jaxtyped`, what does not is checked by
beartype alone, and a function within a function is left as it is.
"""

from __future__ import annotations

import ast
import hashlib
import importlib._bootstrap_external as machinery
import sys
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import cache_from_source, decode_source
from itertools import takewhile
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any
from unittest.mock import patch

NAMES_AXES = {"Float", "Int", "Integer", "Bool", "Num", "Shaped", "Real", "Complex", "UInt8"}
SHAPES, TYPES = "jaxtyping.jaxtyped(typechecker=beartype.beartype)", "beartype.beartype"
# byte code is kept apart from the package's own, and made anew when this file changes
TAG = "typed" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def install(package: str) -> None:
    """Modules of `package` that are imported from now on check themselves."""
    sys.meta_path.insert(0, _Finder(package))


class _Finder(PathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != self.package:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, **_: Any) -> CodeType:
        return compile(checked(decode_source(data)), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        own = partial(_cached_at, cache_from_source)
        with patch.object(machinery, "cache_from_source", own):
            super().exec_module(module)


def _cached_at(place: Any, path: Any, *_: Any, **__: Any) -> str:
    return place(path, optimization=TAG)


def checked(source: str) -> ast.Module:
    """The tree of a module with a decorator on what it defines.

    What is annotated with a name that is imported for type checkers only is left as it is.
    """
    tree = ast.parse(source)
    unknown = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for part in node.body
        if isinstance(part, (ast.Import, ast.ImportFrom))
        for alias in part.names
    }
    axes = NAMES_AXES | {  # and the module's own names for such types
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and _names(node.value) & NAMES_AXES
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for owner in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
        for node in owner.body:
            names = _annotated_with(node)
            if names & unknown:
                continue
            if isinstance(node, ast.FunctionDef):
                _decorate(node, SHAPES if names & axes else TYPES, last=True)
            elif isinstance(node, ast.ClassDef) and names & axes:
                _decorate(node, SHAPES, last=False)  # the fields of a dataclass
    first = sum(1 for _ in takewhile(_comes_first, tree.body))
    tree.body[first:first] = ast.parse("import beartype, jaxtyping").body
    return ast.fix_missing_locations(tree)


def _comes_first(node: ast.stmt) -> bool:
    """The module's docstring and what it takes from the future."""
    return isinstance(node, ast.Expr) or getattr(node, "module", None) == "__future__"


def _decorate(node: ast.FunctionDef | ast.ClassDef, decorator: str, *, last: bool) -> None:
    made = ast.parse(decorator, mode="eval").body
    for part in ast.walk(made):
        ast.copy_location(part, node)
    node.decorator_list.insert(len(node.decorator_list) if last else 0, made)


def _annotated_with(node: ast.AST) -> set[str]:
    """Every name in the annotations of a function's arguments and result, or of a class's
    fields."""
    if isinstance(node, ast.FunctionDef):
        every = [a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg)]
        every.append(node.returns)
    elif isinstance(node, ast.ClassDef):
        every = [part.annotation for part in node.body if isinstance(part, ast.AnnAssign)]
    else:
        every = []
    return set().union(*(_names(annotation) for annotation in every if annotation))


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
