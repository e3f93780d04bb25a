"""The console skips lines that cannot be shown, and signals ask a run to stop."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest

from race_jax.train import console
from race_jax.train.interrupt import StopRequest


class Broken(io.StringIO):
    """An output on which every write fails."""

    def __init__(self, number: int):
        super().__init__()
        self._number = number

    def write(self, text):
        raise OSError(self._number, os.strerror(self._number))


@pytest.mark.parametrize("number", [5, 28, 32])
def test_an_output_that_fails_is_left_out(monkeypatch, capsys, number):
    monkeypatch.setattr(sys, "stdout", Broken(number))
    console.say("lost")
    assert ("nobody reads" in capsys.readouterr().err) == (number != 28)


def test_closed_and_missing_outputs_are_left_out(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        console.say("lost")


def test_a_character_that_the_encoding_lacks_is_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console.say("a ä")
    assert raw.getvalue() == b"a \\xe4\n"


def test_a_decoration_that_fails_is_one_sentence(capsys):
    def act():
        raise RuntimeError("first,\n  second")

    console.decorate("the picture", act)
    assert capsys.readouterr().out == "the picture is left out: first, second\n"


def test_a_reader_that_leaves_changes_no_exit_status():
    program = (
        "import sys, time\nfrom race_jax.train import console\n"
        "sys.stdin.read()\nconsole.say('lost')\nconsole.say('too')\nconsole.settle()"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.close()
        process.stdin.close()
        said = process.stderr.read()
    assert (process.returncode, said.count("\n")) == (0, 1), said
    assert "goes on without it" in said


@pytest.fixture
def heard_signals():
    """Signals as a terminal has them: a job in the background of a script ignores Ctrl-C."""
    names = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    former = {name: signal.signal(name, signal.SIG_DFL) for name in names}
    yield
    for name, handler in former.items():
        signal.signal(name, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_is_a_request_and_is_acknowledged(name, capsys, heard_signals):
    number = getattr(signal, name)
    former = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # delivered twice, as by make: one request
        for _ in range(1000):
            if stop.reason:
                break
            time.sleep(0.01)
        assert stop.signalled == stop.reason == ("Ctrl-C" if name == "SIGINT" else name)
    said = capsys.readouterr().err
    assert said.count("stopping after this step, saving; ") == 1
    assert signal.getsignal(number) is former


def test_an_ignored_signal_stays_ignored(monkeypatch):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.reason is None
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_second_signal_ends_a_step_that_does_not_return(name):
    """The step is a call into C that goes on after each signal, as a wait in XLA does."""
    number = getattr(signal, name)
    # The lock is never free, and a wait for it goes on after a signal.
    program = (
        "import ctypes, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # also if it was ignored
        "from race_jax.train.interrupt import StopRequest\n"
        "lock = (ctypes.c_char * 256)()\nlibc = ctypes.CDLL(None)\n"
        "libc.pthread_mutex_lock(lock)\n"
        "with StopRequest(exit_at_once=True):\n"
        "    print('ready', flush=True)\n    libc.pthread_mutex_lock(lock)\n"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert "stopping after this step, saving" in process.stderr.readline()
        while process.poll() is None:  # the first half second counts as the same request
            process.send_signal(number)
            time.sleep(0.1)
        assert "again: stopped at once" in process.stderr.read()
    assert process.returncode == 128 + number


def test_the_time_limit_counts_from_the_start_of_the_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("race_jax.train.interrupt.time.monotonic", lambda: now[0])
    stop = StopRequest(max_seconds=5.0)
    now[0] = 1000.0
    assert stop.reason is None
    stop.start_clock()
    now[0] = 1004.0
    stop.start_clock()
    assert stop.reason is None
    now[0] = 1005.0
    assert stop.reason == "config.run.max_seconds=5 is over"
