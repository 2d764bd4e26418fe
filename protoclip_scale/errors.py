"""The exceptions that launch scripts turn into exit codes."""


class UserError(ValueError):
    """Bad input of the user's: its message is one line that says what, where and what to do.

    Launch scripts print that line and exit with code 1; they show a traceback for everything else. ``told``: it is in the
    run's status.json, where ranks that fail later look for the first one's. ``may_pass``: its cause may be gone when the run is started again, without
    anybody's doing. ``of_this_host``: other machines may not meet it, so it is told wherever it is met.
    """

    told = False
    may_pass = False
    of_this_host = False


class Outage(UserError):
    """A place that data or checkpoints are read from has not answered for longer than the recipe waits for it."""

    may_pass = True


class NoGpus(UserError):
    """A machine shows no GPU to ranks that were launched for GPUs."""

    of_this_host = True


class LostRank(UserError):
    """Another rank has failed, is gone or does not answer: the line names it, on every rank that is left. ``speaks``: whether it is this rank that prints
    the line, of those on its machine."""

    speaks = True


STOPPED_EXIT_CODE = 75


class Stopped(Exception):
    """All ranks have agreed to stop after a signal; the run can be resumed."""
