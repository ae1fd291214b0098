"""What is raised for the user's wrong input, and for input that changes. Everything else that is raised is a fault of the
program or the machine."""


class InputError(ValueError):
    """The user's input is wrong: the message says what, where, the numbers and the remedy. The command exits with 2."""


class Changed(RuntimeError):
    """A file that a run reads is not what it was when the run began. The run ends (exit code 1); what is sealed stays."""

    def __init__(self, path: str, what: str = "prompts"):
        super().__init__(path, what)
        self.path, self.what = path, what

    def __str__(self) -> str:
        return (
            f"{self.what} {self.path} changed while the run reads it: every sealed row is of the file as it was; put that"
            " back and start the same run again to go on, or give the new one another output"
        )


def require(condition: object, message: str) -> None:
    """Raises InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)
