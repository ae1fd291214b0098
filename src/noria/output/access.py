"""Whether this user may go on with what another user's job left: its lock and its parts.

Modes are left to the umask and to the folder (setgid, ACLs), so that a group goes on with each other's jobs.
"""

from pathlib import Path

from noria.output.sealed import part_files, parts_folder
from noria.tools.lock import lock_path
from noria.tools.writing import not_readable, not_removable, not_writable


def hindrance(output: Path) -> str | None:
    """Words for the first file that keeps this user from going on with an output, and the remedy; None if nothing does."""
    lock, folder = lock_path(output), parts_folder(output)
    if folder.is_dir():
        found = not_readable(folder) or not_writable(folder) or not_removable(folder)
        if found:
            return found
        for part in filter(Path.exists, part_files(folder)):  # a link that leads nowhere is left out
            if (found := not_readable(part) or not_removable(part)) is not None:
                return found
    return not_writable(lock) if lock.exists() else None
