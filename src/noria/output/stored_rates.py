"""The rates that an output's jobs planned with, as the text of a machine.toml: with these later jobs of it plan alike."""

import contextlib
from pathlib import Path

from noria.errors import InputError
from noria.output.generations import open_generations
from noria.output.sealed import parts_folder
from noria.output.segments import change_rates, latest_rates
from noria.tools.looking import Looker


def stored_rates(output: str | Path) -> str | None:
    """Those of the latest job that has some: among the parts, or of a finished output. None: nothing there can be read."""
    try:
        if (found := latest_rates(parts_folder(output))) is not None:
            return found
        if not Path(output).is_file():
            return None
        with Looker() as looker, open_generations(output, looker) as file:
            found = file.attrs.get("rates")
    except (InputError, OSError):
        return None
    return found if isinstance(found, str) else None


def store_rates(output: str | Path, rates: str) -> None:
    """For a job that stopped: what the next one of this output is to plan with. Silent where that cannot be written."""
    with contextlib.suppress(OSError):
        change_rates(parts_folder(output), rates)
