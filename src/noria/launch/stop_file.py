"""The file by which an operator stops a run, from any node that sees it: OUT.h5.stop, made by hand or by a script.

Knows its name beside the output and that it goes away when it is heard; nothing of how a run stops.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from noria.errors import InputError
from noria.tools.atomic import new_file

LOOK_SECONDS = 1.0


class StopFile:
    """Beside the output as it was named and, where that is a link, beside what the link leads to as well."""

    def __init__(self, output: str):
        self.paths = [f"{path}.stop" for path in dict.fromkeys((output, os.path.realpath(output)))]

    def forget_old_ones(self, began: float, say: Callable[[str], None]) -> bool:
        """Removes one that was there before the run `began` (time.time() of this node), and says so: it meant another run.

        Returns whether there was one. Raises InputError if it cannot be removed: it would stop every run.
        """
        removed = False
        for path in self.paths:
            made = _time_of(path)
            if made is None or made > began + _clock_ahead(path):
                continue
            try:
                os.unlink(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise InputError(
                    f"{path} would stop the run and cannot be removed ({error.strerror}): remove it, and start the run again"
                ) from error
            say(f"{path} was there before this run began: it is removed, and the run continues")
            removed = True
        return removed

    def heard(self) -> str | None:
        """Why the run is to stop, if the file is there; it is removed."""
        found = [path for path in self.paths if _time_of(path) is not None]
        if not found:
            return None
        reason = f"{os.path.basename(found[0])} was made"
        for path in found:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                reason += f" and cannot be removed ({error.strerror}): remove it before the next run"
        return reason


def _time_of(path: str) -> float | None:
    """When the file was made, None if there is none. A link that leads nowhere is one too."""
    try:
        return os.lstat(path).st_mtime
    except (OSError, ValueError):
        return None


def _clock_ahead(path: str) -> float:
    """Seconds that the clock which gives files beside this one their times, perhaps a server's, is ahead of this node's."""
    try:
        probe = new_file(Path(path).with_suffix(".clock"))
        try:
            return probe.stat().st_mtime - time.time()
        finally:
            probe.unlink()
    except OSError:  # no file can be made there: nothing tells
        return 0.0
