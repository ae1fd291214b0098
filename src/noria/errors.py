"""What is raised for the user's wrong input. Everything else that is raised is a fault of the program or the machine."""


class InputError(ValueError):
    """The user's input is wrong: the message says what, where, the numbers and the remedy. The command exits with 2."""


def require(condition: object, message: str) -> None:
    """Raises InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)
