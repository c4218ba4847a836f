"""The fixtures."""

import os
import signal
import sys
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["MLX_ENABLE_TF32"] = "0"  # on a GPU: multiply float32 as such, not rounded before
os.environ["MLX_DISABLE_COMPILE"] = "1"  # few tests wait for a compiler, and those say so

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "lab")]

import mlx.core as mx  # noqa: E402
import train  # noqa: E402
from helpers import TINY, Folder, no_compiler, shipped  # noqa: E402

# In a shell's background job Ctrl-C is ignored, also by child processes. Some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def tiny(monkeypatch):
    """Makes train's settings tiny for one test. Call the result to change more of them."""
    def change(**settings):
        for name, value in settings.items():
            monkeypatch.setattr(train, name, value)
    change(**TINY)
    return change


@pytest.fixture
def command(tiny, monkeypatch, capsys):
    """Runs the command line in this process. Returns what it printed, and its exit status."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        try:
            train.main()
        except SystemExit as end:
            return capsys.readouterr().out, end.code
        return capsys.readouterr().out, 0
    return run


@pytest.fixture(scope="session")
def shipped_text():
    """The text that comes with train.py. Figures about it hold for no other."""
    return shipped() or pytest.skip("input.txt is not the text that came with train.py")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the script and a text, which is the current one as well."""
    monkeypatch.chdir(tmp_path)
    return Folder(tmp_path)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A whole run in tiny settings: its folder and its result. Only to be read."""
    folder = Folder(tmp_path_factory.mktemp("finished"))
    result = folder.run()
    assert result.returncode == 0, result.stderr
    return folder, result


@pytest.fixture
def trained(finished_run, folder):
    """The same folder after that run, for a test to change."""
    for name, content in finished_run[0].files().items():
        folder.write(name, content)
    return folder


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the steps of a run move: the first by 1000 seconds, others by so many."""
    clock = SimpleNamespace(now=0, seconds=20, steps=0)
    make_step = train.make_step

    def slow_step(*arguments):
        step, pauses = make_step(*arguments), chain([1000], repeat(clock.seconds))

        def timed(x, y):
            clock.now += next(pauses)
            clock.steps += 1
            return step(x, y)

        return timed

    monkeypatch.setattr(train, "make_step", slow_step)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock.now)
    return clock


@pytest.fixture
def compiled():
    """Compiles for one test."""
    mx.enable_compile()
    try:
        no_compiler()
        yield
    finally:
        mx.disable_compile()
