"""Lets a run that is asked to stop finish its step first."""

import contextlib
import signal
import threading


class DelayedInterrupt(contextlib.AbstractContextManager):
    """Delays a first Ctrl-C or a SIGTERM until `check`, between steps. A second Ctrl-C acts at once.

    A signal that the program ignores, or a SIGTERM that it handles, is left to it. Signals reach only the
    main thread: elsewhere this does nothing. All processes of a team are interrupted where one is.
    """

    def __init__(self, team):
        self.team = team

    def __enter__(self):
        self.pending, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if handler == signal.SIG_DFL or (number == signal.SIGINT and callable(handler)):
                    self.before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number, frame):
        if self.pending and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.pending = True

    def check(self):
        if self.team.any(self.pending):
            self.pending = False
            raise KeyboardInterrupt

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
