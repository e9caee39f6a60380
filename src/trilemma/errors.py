"""The error that is the user's to mend."""


class UserError(Exception):
    """Something the user gave cannot be used.

    The message is one line: what was seen, what was expected, what to do next. The command line
    prints it without a traceback and exits with 1.
    """


class Interrupted(BaseException):
    """A run was asked to stop, by Ctrl-C or SIGTERM, and has saved its state.

    Like KeyboardInterrupt it is no `Exception`: what survives the failure of one run must not
    survive this.
    """
