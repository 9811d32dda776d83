"""The error tree of arllm, all of it: every error that the package raises on purpose is an ``ArllmError``.

ArllmError
├── InputError            what a caller passed to route(): also a ValueError
│   ├── QueryError          the text or query vector
│   ├── BetaError           beta outside [0, 1], or NaN
│   ├── PolicyError         a policy that the bundle does not hold
│   └── CandidateError      an unknown candidate, or an empty candidate set
├── BundleError           a bundle that can't be trusted or read
│   ├── BundleNotFoundError
│   ├── BundleIntegrityError  a file missing, extra, changed, linked, or outside the folder
│   ├── BundleSchemaError     a manifest that this version can't read
│   └── BundleIOMismatchError a graph whose inputs or outputs differ from the manifest
├── VariantError          no such variant, or this machine can't run it as it was measured
├── PoolError             a pool file: names the file and field
├── OutcomesError         an outcomes file: names the file and line
├── RunError              a run folder, or the options of a training run
├── ParityError           an exported variant past its bound against PyTorch
└── MissingExtraError     an optional dependency is not installed: also an ImportError
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ArllmError(Exception):
    """Base of all errors of arllm. The message says what is wrong and what mends it."""


class InputError(ArllmError, ValueError):
    """A value passed by the caller is unusable."""


class QueryError(InputError):
    """The query is not a string, or the query vector has the wrong width or is not finite."""


class BetaError(InputError):
    """beta is not a number in [0, 1]."""


class PolicyError(InputError):
    """The policy is unknown or not part of this bundle."""


class CandidateError(InputError):
    """A candidate is unknown, or no candidate is left."""


class BundleError(ArllmError):
    """A bundle that can't be read or trusted."""


class BundleNotFoundError(BundleError, FileNotFoundError):
    """There is no bundle at this path and none of this name ships with arllm."""

    def __str__(self) -> str:  # FileNotFoundError would print an errno tuple
        return str(self.args[0])


class BundleIntegrityError(BundleError):
    """A file of the bundle is missing, extra, changed, a link, or outside the folder."""


class BundleSchemaError(BundleError):
    """The manifest is malformed, or newer than this version of arllm."""


class BundleIOMismatchError(BundleError):
    """A graph's inputs or outputs differ from what the manifest declares."""


class VariantError(ArllmError):
    """The variant does not exist, or this machine can't run it as it was measured."""


class PoolError(ArllmError, ValueError):
    """A pool file or a pool's values are unusable."""


class OutcomesError(ArllmError, ValueError):
    """An outcomes file is unusable. The message starts with ``file:line:`` where a line is at fault."""


class RunError(ArllmError):
    """A run folder is unusable, or a training option contradicts it."""


class ExportError(ArllmError):
    """A bundle can't be built from what was given."""


class ParityError(ExportError):
    """An exported variant differs from PyTorch by more than its bound."""


class MissingExtraError(ArllmError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        super().__init__(
            f'{purpose} needs the module "{module}", which is not installed: pip install "arllm[{extra}]"'
        )
        self.module = module
        self.extra = extra


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Around imports: a module that is not installed becomes a :class:`MissingExtraError` naming the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if isinstance(error, ArllmError):
            raise
        raise MissingExtraError(str(error.name), extra, purpose) from None
