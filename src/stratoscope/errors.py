"""The errors a user can meet: each says what was asked, what was found and what to do.

Every class has a page under `docs/errors/`. The command line prints the message as one paragraph
and exits with 2.
"""

from __future__ import annotations


class StratoscopeError(Exception):
    """The common parent: anything stratoscope refuses on purpose."""


class SiteError(StratoscopeError):
    """A site name that cannot be read, or that this architecture does not have."""


class FamilyError(StratoscopeError):
    """An architecture or config key that no family handles, or a family whose invariants fail on
    this model."""


class LoadError(StratoscopeError):
    """A model, tokenizer or weight file that could not be obtained, read or trusted."""


class InputError(StratoscopeError):
    """Prompts, answers, images or positions that this model or method cannot take."""


class MemoryRefusal(StratoscopeError):
    """A capture or sweep that is predicted not to fit in memory."""


class ResultError(StratoscopeError):
    """An unknown axis word, a wrong shape, or a result file that cannot be read."""


class MethodError(StratoscopeError):
    """An unknown method, or a verb it does not have."""


class ClaimError(StratoscopeError):
    """An unknown paper or claim, a claim that cannot be judged, or a verdict file that cannot be
    read or written."""
