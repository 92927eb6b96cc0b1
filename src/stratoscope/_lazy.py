"""Open a package's files only when they are asked for (PEP 562), so `import stratoscope` costs
nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def lazy(
    package: str, path: Iterable[str], **elsewhere: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package: its files and subfolders, as its folder
    lists them.

    `elsewhere` maps further names to the module that defines them (`load="stratoscope.models"`).
    """

    def names() -> list[str]:
        import pkgutil

        return sorted(
            {m.name for m in pkgutil.iter_modules(path) if m.name[0] != "_"} | elsewhere.keys()
        )

    def get(name: str) -> Any:
        from difflib import get_close_matches
        from importlib import import_module

        if name in elsewhere:
            return getattr(import_module(elsewhere[name]), name)
        # Python and its tools probe for these; do not list the folder each time
        if name.startswith("__"):
            raise AttributeError(f"{package} has no {name!r}")
        if name in names():
            return import_module(f"{package}.{name}")
        near = get_close_matches(name, names(), 3) or names()
        raise AttributeError(
            f"{package} has no {name!r}; nearest: {', '.join(near) or 'nothing, it is empty'}"
        )

    return get, names
