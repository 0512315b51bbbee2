"""Exceptions that every floor knows."""


class UserError(Exception):
    """An error that the user can fix: the message says what was given, what is allowed and what to do.

    The command prints the message without a traceback and exits with code 2.
    """


class StaleAttempt(Exception):
    """A later attempt owns the run; this one must write nothing more and leave with code 88."""
