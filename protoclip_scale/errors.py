"""The exceptions that launch scripts turn into exit codes."""


class UserError(ValueError):
    """Bad input of the user's: its message is one line that says what, where and what to do.

    Launch scripts print that line and exit with code 1; they show a traceback for everything else. ``told``: it is in the
    run's status.json, where ranks that fail later look for the first one's.
    """

    told = False


class LostRank(UserError):
    """Another rank has failed, is gone or does not answer: the line names it, on every rank that is left."""


STOPPED_EXIT_CODE = 75


class Stopped(Exception):
    """All ranks have agreed to stop after a signal; the run can be resumed."""
