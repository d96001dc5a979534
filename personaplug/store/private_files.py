"""Files with users' data: only their owner may read them, whatever the umask is."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from personaplug.infra.atomic_io import storage_errors

logger = logging.getLogger(__name__)

_OTHERS = 0o077  # what the group and all others may do


def create_private(path: Path) -> int:
    """Create a file that only its owner may read and write, and return its descriptor; the file must not exist."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.fchmod(descriptor, 0o600)  # the umask may have taken the owner's rights too
    return descriptor


def make_private_folder(folder: Path) -> None:
    """Create a folder and its missing parents, which only their owner may enter."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    # `storage_errors` makes the folder of a file: here that of a file in the folder above, which is there by then.
    for parent in reversed(missing):
        with storage_errors(parent):
            parent.mkdir(mode=0o700, exist_ok=True)


def ensure_private(path: Path) -> None:
    """Create a missing file as private, and take the rights of others away from an existing one."""
    with storage_errors(path):
        try:
            os.close(create_private(path))
        except FileExistsError:
            restrict(path)


def restrict(path: Path) -> None:
    """Take the rights of others away from a file, and say so in the log; without the right to, only say so."""
    mode = path.stat().st_mode
    if not mode & _OTHERS or not stat.S_ISREG(mode):  # all need a device such as /dev/null
        return
    try:
        path.chmod(mode & ~_OTHERS & 0o777)
        logger.warning("%s could be opened by other users of this machine; now only its owner may.", path)
    except PermissionError:
        logger.warning("%s can be opened by other users of this machine. Its owner should run: chmod 600", path)
