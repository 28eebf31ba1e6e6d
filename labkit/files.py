"""Writing a file so that a reader, or a kill, never meets half of it."""

import contextlib
import hashlib
import os
from pathlib import Path

from labkit.errors import LabkitError


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside `path`, then move into place.

    Raises:
        LabkitError: the folder cannot be written to, or the disk is full; `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise LabkitError(f"cannot write {path}: {error.strerror}: free or unlock it") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def sha256(content: bytes) -> str:
    """Hex digest of some bytes."""
    return hashlib.sha256(content).hexdigest()
