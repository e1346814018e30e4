"""The one exception for bad input: its message is a single line that a user can act on."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Input that cannot be used. The message says what was got, what is allowed and how to repair it.

    The command line prints the message and exits with code 2; library users can catch it as ``ValueError``.
    """
