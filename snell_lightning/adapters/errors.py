"""The one exception that stands for a user's mistake, and how its text lists names."""

from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: its text is one line that says what was given, what was expected, what to do.

    The command line prints that line without a traceback and exits with a status other than zero.
    """


def some(names: Iterable[str], count: int = 3) -> str:
    """The first few of these names, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:count]) + (f" and {len(ordered) - count} more" if len(ordered) > count else "")
