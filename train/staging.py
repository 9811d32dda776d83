"""Atomic folders: made beside the target, renamed to it on success, removed on any failure."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """A fresh folder in ``out``'s parent (made if missing): a rename is atomic only within one file system.

    ``out`` must not exist, or be an empty folder; callers refuse anything else with an error of their own.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp's 0700 would shut out other users, a gateway's among them
        for path in staging.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.rename(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
