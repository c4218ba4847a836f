"""What the tests share: tiny settings, and runs of an edited copy of train.py in a folder."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["MLX_ENABLE_TF32"] = "0"  # on a GPU: multiply float32 as such, not rounded before
os.environ["MLX_DISABLE_COMPILE"] = "1"  # no test waits for a compiler

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import experiments  # noqa: E402
import mlx.core as mx  # noqa: E402
import train  # noqa: E402

# In a shell's background job Ctrl-C is ignored, also by child processes. Some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

SOURCE = (ROOT / "train.py").read_text(encoding="utf-8")
ON_CPU = mx.default_device() == mx.cpu  # there, equal runs are equal to the last bit
unix = pytest.mark.skipif(os.name == "nt", reason="needs Unix signals, pipes, or terminals")

# Every setting has a value here, so that no test depends on what stands in train.py.
TINY = dict(ctx_len=12, n_emb=16, n_heads=2, n_layers=1, dropout=0.0, num_epochs=2, batch_size=4,
            lr=1e-2, warmup_steps=3, weight_decay=0.1, beta1=0.9, beta2=0.99, max_norm=1.0, seed=0,
            max_new_tokens=40, temperature=0.8, top_k=40)
TEXT = "".join(map(chr, range(32, 127))) + "\n"  # so that it has any plain prompt a reader may try
TEXT += "".join(f"{n} sheep and {n * 7 % 10} goats went over the hill; one came back.\n"
                for n in range(16))
SHIPPED = "46191818cac3a9016d23b81f50be44eeb3bc237fa841e839b521c5badcfa357e"  # SHA-256


@pytest.fixture
def tiny(monkeypatch):
    """Makes train's settings tiny for one test. Call the result to change more of them."""
    def change(**settings):
        for name, value in settings.items():
            monkeypatch.setattr(train, name, value)
    change(**TINY)
    return change


@pytest.fixture(scope="session")
def shipped_text():
    """The text that comes with train.py. Figures about it hold for no other."""
    path = ROOT / "input.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if hashlib.sha256(text.encode()).hexdigest() != SHIPPED:
        pytest.skip("input.txt is not the text that came with train.py")
    return text


def with_settings(source, **settings):
    """The script with settings assigned anew at the end of section 1."""
    lines = "".join(f"{name} = {value!r}\n" for name, value in settings.items())
    try:
        return experiments.set_constants(source, lines)
    except ValueError as error:
        pytest.skip(str(error))


def agrees(value, rounded, places):
    """Whether a number that is rounded to so many places can be this value."""
    return abs(value - rounded) <= 0.5000001 * 10**-places


class Folder:
    """A folder with a copy of train.py in tiny settings, and a small input.txt."""

    def __init__(self, path):
        self.path = path
        self.started = []
        self.edit()
        self.write("input.txt", TEXT)

    def edit(self, **settings):
        """Writes train.py anew, in tiny settings but for these."""
        self.write("train.py", with_settings(SOURCE, **{**TINY, **settings}))

    def write(self, name, text):
        (self.path / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    def read(self, name):
        return (self.path / name).read_bytes()

    def command(self, *arguments, code=None):
        """What subprocess needs to start train.py with arguments, or else some Python code."""
        program = ["-c", code] if code else ["train.py"]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1"}
        environment.pop("PYTHONUNBUFFERED", None)
        return dict(args=[sys.executable, *program, *arguments], cwd=self.path, text=True,
                    env=environment, encoding="utf-8")

    def run(self, *arguments, code=None, **options):
        return subprocess.run(**{**self.command(*arguments, code=code), "capture_output": True,
                                 "timeout": 120, **options})

    def start(self, code, **options):
        """Like run(), but does not wait for the end. Returns the process."""
        self.started.append(subprocess.Popen(**{
            **self.command(code=code), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
            **options}))
        return self.started[-1]

    def end(self):
        """Ends what a test that failed may have left running."""
        for process in self.started:
            process.kill()
            process.wait()

    def files(self):
        """The contents of all files but train.py, by name."""
        return {file.name: file.read_bytes() for file in self.path.iterdir()
                if file.is_file() and file.name != "train.py"}


@pytest.fixture
def folder(tmp_path):
    folder = Folder(tmp_path)
    yield folder
    folder.end()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A whole run in tiny settings: its folder and its result. Only to be read."""
    folder = Folder(tmp_path_factory.mktemp("finished"))
    result = folder.run()
    assert result.returncode == 0, result.stderr
    return folder, result


@pytest.fixture
def trained(finished_run, tmp_path):
    """A copy of that run's folder, which a test may change."""
    for name, content in finished_run[0].files().items():
        (tmp_path / name).write_bytes(content)
    folder = Folder(tmp_path)
    yield folder
    folder.end()
