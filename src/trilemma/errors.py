"""The error that is the user's to mend."""


class UserError(Exception):
    """Something the user gave cannot be used.

    The message is one line: what was seen, what was expected, what to do next. The command line
    prints it without a traceback and exits with 1.
    """
