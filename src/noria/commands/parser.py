"""The parser of a command line: its errors are those of all of Noria."""

import argparse
from typing import NoReturn

from noria.errors import InputError


class Parser(argparse.ArgumentParser):
    """Raises InputError, in one line, where argparse would print the usage and leave."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help says more")
