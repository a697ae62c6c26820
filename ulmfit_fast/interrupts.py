"""Lets a run that is asked to stop finish its step first."""

import contextlib
import signal
import threading
from typing import Any

from .team import Team


class DelayedInterrupt(contextlib.AbstractContextManager["DelayedInterrupt"]):
    """Delays a first Ctrl-C or a SIGTERM until `check`, between steps. A second Ctrl-C acts at once.

    A signal that the program ignores, or a SIGTERM that it handles, is left to it. Signals reach only the
    main thread: elsewhere this does nothing. All processes of a team are interrupted where one is.
    """

    def __init__(self, team: Team) -> None:
        self.team = team

    def __enter__(self) -> "DelayedInterrupt":
        self.pending = False
        self.before: dict[int, Any] = {}  # the handlers
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if handler == signal.SIG_DFL or (number == signal.SIGINT and callable(handler)):
                    self.before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: object) -> None:
        if self.pending and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.pending = True

    def check(self) -> None:
        if self.team.any(self.pending):
            self.pending = False
            raise KeyboardInterrupt

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
