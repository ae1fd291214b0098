"""The parser of a command line: its errors are those of all of Noria."""

import argparse
from typing import NoReturn

from noria.errors import InputError


def once_for_each(flag: str, first: str, other: str) -> str:
    """In words, how two values are given with a flag that takes one."""
    return f"{flag} takes one value, give it once for each: {flag} {first} {flag} {other}"


class Parser(argparse.ArgumentParser):
    """Raises InputError, in one line, where argparse would print the usage and leave."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help says more")

    def behind(self, argv: list[str], word: str) -> str:
        """In words, that a word of the command line stands behind the value of a flag that takes one; "" where it does not."""
        before = argv[: argv.index(word)]
        place = max((place for place, one in enumerate(before) if one.startswith("-")), default=len(before))
        action = self._option_string_actions.get("".join(before[place : place + 1]))
        if word.startswith("-") or action is None or action.nargs is not None or place + 1 == len(before):
            return ""
        flag, first, other = before[place], *[*before[place + 1 :], word][:2]
        again = isinstance(action, argparse._AppendAction)
        return f": {once_for_each(flag, first, other)}" if again else f": {flag} takes one value"
