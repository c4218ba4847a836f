"""The fixtures."""

import os
import signal
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["MLX_ENABLE_TF32"] = "0"  # on a GPU: multiply float32 as such, not rounded before
os.environ["MLX_DISABLE_COMPILE"] = "1"  # few tests wait for a compiler, and those say so

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "lab")]

import mlx.core as mx  # noqa: E402
import train  # noqa: E402
from helpers import TINY, Folder, noting_steps  # noqa: E402

SHIPPED = 366729240  # the checksum of input.txt

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
    """Runs the command line of a module in this process. Returns what it printed, and its exit
    status."""
    def run(*arguments, module=train):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        status = 0
        try:
            module.main()
        except SystemExit as end:
            status = end.code
        return capsys.readouterr().out.replace("\r", "\n"), status  # \r follows a line of progress
    return run


@pytest.fixture(scope="session")
def shipped_text():
    """The text that comes with train.py. Figures about it hold for no other."""
    path = ROOT / "input.txt"
    content = path.read_bytes().replace(b"\r\n", b"\n") if path.is_file() else b""
    if zlib.crc32(content) != SHIPPED:
        pytest.skip("input.txt is not the text that came with train.py")
    return content.decode()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the script and a text, which is the current one as well."""
    monkeypatch.chdir(tmp_path)
    return Folder(tmp_path)


@pytest.fixture
def other_folder(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("other"))


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
def watch(monkeypatch):
    """Call it to get a list of what a function is given, and returns, from then on."""
    def start(owner, name):
        calls, real = [], getattr(owner, name)

        def noting(*given, **named):
            result = real(*given, **named)
            calls.append((*given, *named.values(), result))
            return result

        monkeypatch.setattr(owner, name, noting)
        return calls
    return start


@pytest.fixture
def steps(monkeypatch):
    """Notes each step of a run, and gives it a time that only steps take: the first 1000 seconds
    (it compiles), each other one as many as the test says."""
    steps, clock = SimpleNamespace(seconds=20, rows=[]), [0]

    def note(model, i, x):
        clock[0] += steps.seconds if i > 0 else 1000
        steps.rows.append(x.tolist())

    monkeypatch.setattr(train, "make_step", noting_steps(train.make_step, note))
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    return steps


@pytest.fixture
def compiled():
    """Compiles for one test."""
    mx.enable_compile()
    yield
    mx.disable_compile()
