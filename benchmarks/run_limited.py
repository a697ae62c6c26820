"""One command with a time limit, its output in a file."""

import os
import resource
import signal
import subprocess
import time

GRACE = ((signal.SIGINT, 8.0), (signal.SIGABRT, 4.0), (signal.SIGKILL, 10.0))  # signal, seconds to obey


def run_limited(words, limit, log, cwd, environment=None):
    """Runs `words` in `cwd` for at most `limit` seconds, appending its output to `log`.

    -> {"outcome": "passed", "failed" or "timed out", "returncode", "seconds", "tail": the last lines}.
    At the limit it is interrupted, on which pytest prints its results; then aborted, on which Python prints
    where it was; then killed, with its children.
    """
    begin = time.monotonic()
    outcome, code = None, None
    with open(log, "ab") as output:
        output.write(f"\n$ {' '.join(words)}\n".encode())
        output.flush()
        start = output.tell()
        values = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **(environment or {})}
        try:
            child = subprocess.Popen(
                words, stdout=output, stderr=subprocess.STDOUT, env=values, cwd=cwd, preexec_fn=_apart
            )
        except OSError as error:
            output.write(f"{error}\n".encode())
            outcome = "failed"
        else:
            try:
                code = child.wait(limit)
                outcome = "failed" if code else "passed"
            except subprocess.TimeoutExpired:
                outcome = "timed out"
            finally:  # also if this program itself is terminated
                _end(child)
    seconds = round(time.monotonic() - begin, 1)
    with open(log, "rb") as output:
        output.seek(max(start, os.path.getsize(log) - 20000))
        tail = output.read().decode(errors="replace").splitlines()
    return {"outcome": outcome, "returncode": code, "seconds": seconds, "tail": tail}


def _apart():
    """In the child: a process group of its own, so that it can be ended as a whole, and no core dump.

    SIGINT is restored: a shell's background jobs ignore it, and their children would too.
    """
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end(child):
    """Ends the child's group, in steps."""
    for number, seconds in GRACE:
        if child.poll() is not None:
            break
        _signal(child, number)
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    _signal(child, signal.SIGKILL)  # what it started and left behind


def _signal(child, number):
    try:
        os.killpg(child.pid, number)
    except (ProcessLookupError, PermissionError):
        pass  # all of them have ended
