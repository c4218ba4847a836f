"""What all tests share: the module under test, tiny settings, and runs of an edited copy."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["MLX_ENABLE_TF32"] = "0"  # on a GPU: multiply float32 as such, not rounded before

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402
import train  # noqa: E402

# A shell's background job ignores Ctrl-C, and so would all that it starts: tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Most tests run without mx.compile, and so without waiting for a compiler. What does run with it
# has the same settings everywhere, so that one set of kernels is made: it can take a minute.
mx.disable_compile()

EXACT = mx.default_device() == mx.cpu  # a GPU adds in no fixed order: there, equal to rounding
unix = pytest.mark.skipif(os.name == "nt", reason="signals, pipes and limits of Unix")

# Every setting has a value here, so that no test depends on what stands in train.py.
TINY = dict(small=True, ctx_len=12, n_emb=16, n_heads=2, n_layers=1, dropout=0.0, num_epochs=2,
            batch_size=4, lr=1e-2, warmup_steps=3, weight_decay=0.1, beta1=0.9, beta2=0.99,
            max_norm=1.0, seed=0, max_new_tokens=40, temperature=0.8, top_k=40)
TEXT = "".join(f"{n} sheep and {n * 7 % 10} goats went over the hill; one came back.\n"
               for n in range(16))
SHIPPED = "46191818cac3a9016d23b81f50be44eeb3bc237fa841e839b521c5badcfa357e"


@pytest.fixture
def tiny(monkeypatch):
    """train's settings made tiny for one test; call the result to change more of them."""
    def change(**settings):
        for name, value in settings.items():
            monkeypatch.setattr(train, name, value)
    change(**TINY)
    return change


@pytest.fixture
def compiled(tiny, compiled_run):
    """Lets mx.compile work, with the settings of all that is compiled."""
    compiled_run.started[0].wait()  # by now all kernels are made
    tiny(**compiled_run.settings)
    mx.enable_compile()
    yield
    mx.disable_compile()


@pytest.fixture(scope="session")
def shipped_text():
    """The text that comes with the script. Its numbers are no one else's."""
    path = ROOT / "input.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if hashlib.sha256(text.encode()).hexdigest() != SHIPPED:
        pytest.skip("input.txt is not the text that came with train.py")
    return text


def edited(source, **settings):
    """The script with settings assigned anew at the end of section 1, as a reader would."""
    mark = "# " + "-" * 93 + "\n# 2. Data\n"
    assert source.count(mark) == 1
    lines = "".join(f"{name} = {value!r}\n" for name, value in settings.items())
    return source.replace(mark, lines + mark)


class Folder:
    """A folder with a copy of train.py in tiny settings and a small input.txt.

    What is changed in `source`, the script's code, or in `settings` holds from the next edit() on.
    """

    def __init__(self, path, source=None, **settings):
        self.path = path
        self.source = source or (ROOT / "train.py").read_text(encoding="utf-8")
        self.settings = dict(TINY)
        self.started = []
        self.edit(**settings)
        self.write("input.txt", TEXT)

    def edit(self, **settings):
        self.write("train.py", edited(self.source, **{**self.settings, **settings}))

    def write(self, name, text):
        (self.path / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    def read(self, name):
        return (self.path / name).read_bytes()

    def command(self, *arguments, before=""):
        """What subprocess needs to start the script, or to run some code and then main()."""
        program = ["train.py"]
        if before:
            program = ["-B", "-c", f"import train\n{before}\ntrain.main()"]
        environment = {**os.environ, "MLX_DISABLE_COMPILE": "1"}
        environment.pop("PYTHONUNBUFFERED", None)
        return dict(args=[sys.executable, *program, *arguments], cwd=self.path, text=True,
                    env=environment, encoding="utf-8")

    def run(self, *arguments, before="", **options):
        return subprocess.run(**{**self.command(*arguments, before=before),
                                 "capture_output": True, "timeout": 120, **options})

    def start(self, *arguments, before="", **options):
        """A process, in a group of its own as a terminal's are, whose output can be read."""
        self.started.append(subprocess.Popen(**{
            **self.command(*arguments, before=before), "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE, "start_new_session": True, **options}))
        return self.started[-1]

    def end(self):
        """Ends what a test that failed may have left running."""
        for process in self.started:
            process.kill()
            process.wait()

    def files(self):
        return {file.name: file.read_bytes() for file in self.path.iterdir()
                if file.is_file() and file.name != "train.py"}


@pytest.fixture
def folder(tmp_path):
    folder = Folder(tmp_path)
    yield folder
    folder.end()


@pytest.fixture(scope="session", autouse=True)
def compiled_run(request, tmp_path_factory):
    """The one whole run with mx.compile. It begins before the tests, for the compiler's sake."""
    if any("compiled" in item.fixturenames for item in request.session.items):
        folder = Folder(tmp_path_factory.mktemp("compiled"))
        folder.settings["dropout"] = 0.3
        folder.edit()
        folder.start(env=dict(os.environ))
        yield folder
        folder.end()
    else:
        yield None


@pytest.fixture(scope="session")
def first_run(tmp_path_factory):
    """A whole run in tiny settings: its folder and its result. Only to be read."""
    folder = Folder(tmp_path_factory.mktemp("first"))
    result = folder.run()
    assert result.returncode == 0, result.stderr
    return folder, result


@pytest.fixture
def trained(first_run, tmp_path):
    """A folder of one's own in which that run has taken place."""
    for file in first_run[0].path.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    folder = Folder(tmp_path)
    yield folder
    folder.end()
