"""The one exception that speaks to a person."""


class UserError(Exception):
    """A mistake somebody can mend: the message says what was given, what is allowed and what to do.

    The command prints the message without a traceback and exits with code 2.
    """
