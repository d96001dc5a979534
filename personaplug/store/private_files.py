"""Files that only their owner may read, independent of the umask."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from personaplug.infra.atomic_io import storage_errors

logger = logging.getLogger(__name__)

_OTHERS = 0o077  # permissions of the group and of all others


def create_private(path: Path) -> int:
    """Create a file that only its owner may read and write, and return its descriptor; the file must not exist."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.fchmod(descriptor, 0o600)  # the umask may have removed the owner's permissions too
    return descriptor


def make_private_folder(folder: Path) -> None:
    """Create a folder and its missing parents, which only their owner may enter."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    # `storage_errors` creates missing parents with default permissions, so the outermost folder comes first.
    for parent in reversed(missing):
        with storage_errors(parent):
            parent.mkdir(mode=0o700, exist_ok=True)


def ensure_private(path: Path) -> None:
    """Create a missing file as private; remove the permissions of others from an existing file."""
    with storage_errors(path):
        try:
            os.close(create_private(path))
        except FileExistsError:
            restrict(path)


def restrict(path: Path) -> None:
    """Remove the permissions of others from a file and log a warning; without the right to do so, only log."""
    mode = path.stat().st_mode
    if not mode & _OTHERS or not stat.S_ISREG(mode):  # a device such as /dev/null must stay open to all
        return
    try:
        path.chmod(mode & ~_OTHERS & 0o777)
        logger.warning("Other users of this machine could open %s; now only its owner can.", path)
    except PermissionError:
        logger.warning("Other users of this machine can open %s. Its owner should run chmod 600 on it.", path)
