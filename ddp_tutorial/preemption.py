"""Leaving when a scheduler or a person asks for it."""

import signal

from ddp_tutorial.cli import UserError


class Stopped(UserError):
    """The run ends before its last epoch because it was asked to."""

    kind, code = "stopped", 75  # EX_TEMPFAIL of sysexits.h: not done, try again


class StopRequest:
    """Notes SIGTERM and SIGUSR1, as schedulers send them before they take a machine away, and Ctrl-C.

    `requested` says whether this process got one, `agreed` is for the caller: whether it will stop.
    A second Ctrl-C ends the process at once.
    """

    def __init__(self):
        self.requested = self.agreed = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
