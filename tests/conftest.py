"""What all tests share: the module under test, tiny settings, and runs of an edited copy."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

# A shell's background job ignores Ctrl-C, and so would all that it starts: tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = dict(ctx_len=12, n_emb=16, n_heads=2, n_layers=2, dropout=0.0, num_epochs=2, batch_size=4,
            lr=1e-2, warmup_steps=3, max_new_tokens=40)
TEXT = "".join(f"{n} sheep and {n * 7 % 10} goats went over the hill; one came back.\n"
               for n in range(24))


@pytest.fixture
def tiny(monkeypatch):
    """train's settings made tiny for one test; call the result to change more of them."""
    def change(**settings):
        for name, value in settings.items():
            monkeypatch.setattr(train, name, value)
    change(**TINY)
    return change


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
        self.edit(**settings)
        (path / "input.txt").write_text(TEXT)

    def edit(self, **settings):
        source = edited(self.source, **{**self.settings, **settings})
        (self.path / "train.py").write_text(source, encoding="utf-8")

    def command(self, *arguments):
        return dict(args=[sys.executable, "train.py", *arguments], cwd=self.path, text=True,
                    env={**os.environ, "MLX_DISABLE_COMPILE": "1"}, encoding="utf-8")

    def run(self, *arguments, **options):
        return subprocess.run(**{**self.command(*arguments), "capture_output": True,
                                 "timeout": 120, **options})

    def files(self):
        return {file.name: file.read_bytes() for file in self.path.iterdir()
                if file.is_file() and file.name != "train.py"}


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)
