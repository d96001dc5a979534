"""Check symbolic links in a run folder from an untrusted source."""

from __future__ import annotations

from pathlib import Path

from personaplug.errors import RunConflict


def check_links(folder: Path) -> None:
    """Refuse links that lead out of a run or are broken, because the program would write files elsewhere."""
    root = folder.resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and not _is_within(path, root):
            raise RunConflict(f"{path} is a link that leads out of the run. Replace the link by the files.")


def _is_within(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # a link to itself
        return False
