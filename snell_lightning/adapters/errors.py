"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake in what the user gave: its text is one line that says what was given, what was expected, what to do.

    The command line prints that line without a traceback and exits with a status other than zero.
    """
