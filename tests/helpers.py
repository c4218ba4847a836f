"""What the tests share: tiny settings, edits of train.py, and runs of it in a folder."""

import itertools
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import experiments
import mlx.core as mx
import numpy as np
import pytest
import train
from mlx.utils import tree_flatten, tree_map

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "train.py").read_text(encoding="utf-8")
ON_CPU = mx.default_device() == mx.cpu  # there, equal runs are equal to the last bit
unix = pytest.mark.skipif(os.name == "nt", reason="needs Unix signals, pipes, or terminals")

# Every setting has a value here, so that no test depends on what stands in train.py.
TINY = dict(ctx_len=12, n_emb=16, n_heads=2, n_layers=1, dropout=0.0, num_epochs=2, batch_size=8,
            lr=1e-2, warmup_steps=3, weight_decay=0.1, beta1=0.9, beta2=0.99, max_norm=1.0, seed=0,
            max_new_tokens=40, temperature=0.8, top_k=40)
TEXT = "".join(map(chr, range(32, 127))) + "\n"  # so that it has any plain prompt a reader may try
TEXT += "".join(f"{n} sheep and {n * 7 % 10} goats went over the hill; one came back.\n"
                for n in range(16))
OTHER_TEXT = TEXT[:-3] + TEXT[-2] + TEXT[-3] + "\n"  # of the same characters
VOCAB = sorted(set(TEXT))


def missing(reason):
    """For what is not found in train.py: a reader may have changed it, but under CI it fails."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


# Edits of the source


def edited(source, *edits):
    """The source after edits: a regular expression, which must match once, and what replaces it."""
    for pattern, new in edits:
        source, n = re.subn(pattern, new, source, flags=re.M)
        if n != 1:
            missing(f"train.py has {pattern!r} {n} times")
    return source


def applied(edit, *arguments):
    """What an edit of the source gives, if train.py still has the lines that it replaces."""
    try:
        return edit(*arguments)
    except ValueError as error:
        missing(str(error))


def forced(small):
    """The script with its settings for the small model, or for the default one."""
    return applied(experiments.forced, SOURCE, small)


def with_settings(source, **settings):
    """The script with settings assigned anew at the end of section 1."""
    lines = "".join(f"{name} = {value!r}\n" for name, value in settings.items())
    return experiments.set_constants(source, lines)


def module_from(source, name="edited"):
    """A module with that source."""
    module = sys.modules[name] = types.ModuleType(name)  # dataclasses look their module up
    exec(compile(source, f"{name}.py", "exec"), vars(module))
    return module


# Models and numbers


def random_model(**sizes):
    """A model in eval mode whose weights are large enough for every part to matter."""
    config = {**dict(ctx_len=12, n_emb=16, n_heads=2, n_layers=2, dropout=0.0), **sizes}
    mx.random.seed(0)
    model = train.GPT(train.GPTConfig(vocab_size=11, **config))
    model.update(tree_map(lambda w: w + 0.3 * mx.random.normal(w.shape), model.parameters()))
    model.eval()
    return model


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 11, shape)


def named(tree):
    """The arrays of a tree by name, in NumPy and float64."""
    return {name: np.array(array, dtype=np.float64) for name, array in tree_flatten(tree)}


def agrees(value, rounded, places):
    """Whether a number that is rounded to so many places can be this value."""
    return abs(value - rounded) <= 0.5000001 * 10**-places


# What a run does, prints, and leaves


def noting_steps(make_step, note):
    """make_step, but before each step note(model, i, x) is called, where i counts from 0."""
    def make_noting_step(model, optimizer):
        step, numbers = make_step(model, optimizer), itertools.count()

        def noting(x, y):
            note(model, next(numbers), x)
            return step(x, y)

        return noting
    return make_noting_step


def losses(output):
    """The number, the training loss, and the validation loss of each epoch that was printed."""
    found = re.findall(r"^Epoch +(\d+) \| train = (\S+) \| val = (\S+) \|", output, re.M)
    return [(int(n), float(t), float(v)) for n, t, v in found]


def epochs(output):
    return [n for n, _, _ in losses(output)]


def run_log(folder):
    return [json.loads(line) for line in folder.read("runs.jsonl").splitlines()]


def assert_same_run(folder, other):
    """The same weights, optimizer, and text: on a CPU, to the last bit."""
    for name in ("model.safetensors", "checkpoint.safetensors"):
        ours, theirs = folder.arrays(name), other.arrays(name)
        assert ours.keys() == theirs.keys()
        if ON_CPU:
            assert [key for key in ours if not np.array_equal(ours[key], theirs[key])] == []
    if ON_CPU:
        assert folder.read("completions.txt") == other.read("completions.txt")


def refused(folder, command, *arguments, **options):
    """Runs a command that must refuse, and change nothing. Returns its one-line message."""
    before = folder.files()
    output, status = command(*arguments, **options)
    assert isinstance(status, str) and "\n" not in status  # which Python prints, and exits with 1
    assert not arguments or output == ""
    assert epochs(output) == [] and folder.files() == before
    return status


class Folder:
    """A folder with a copy of train.py in tiny settings, and a small input.txt."""

    def __init__(self, path):
        self.path = path
        self.edit()
        self.write("input.txt", TEXT)

    def edit(self, source=SOURCE, **settings):
        """Writes train.py anew, in tiny settings but for these."""
        self.write("train.py", with_settings(source, **{**TINY, **settings}))

    def write(self, name, text):
        (self.path / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    def read(self, name):
        return (self.path / name).read_bytes()

    def arrays(self, name="model.safetensors"):
        return {key: np.array(array) for key, array in mx.load(str(self.path / name)).items()}

    def files(self):
        """The contents of all files but train.py, by name."""
        return {file.name: file.read_bytes() for file in self.path.iterdir()
                if file.is_file() and file.name != "train.py"}

    def run(self, *arguments, script="train.py", code=None, compiled=False, launcher=(),
            variables=None, **options):
        """Runs the script, or else some Python code, with arguments in a process of its own."""
        program = [*launcher, sys.executable, *(["-c", code] if code else [script])]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1"}
        for name in ("PYTHONUNBUFFERED", *(["MLX_DISABLE_COMPILE"] if compiled else [])):
            environment.pop(name, None)
        options = {"capture_output": True, "encoding": "utf-8", "timeout": 240, **options}
        return subprocess.run([*program, *arguments], cwd=self.path,
                              env={**environment, **(variables or {})}, **options)


# Runs the script, and sends itself a signal at the n-th moment before or after a function runs.
STOP = """
import os, signal, sys, train
sys.stdout.reconfigure(line_buffering=True)
moments = []
def reach(moment):
    moments.append(moment)
    if moment == {moment!r} and moments.count(moment) == {n}:
        os.kill(os.getpid(), signal.{signal})
def watch(owner, name):
    def function(*given, real=getattr(owner, name)):
        reach("before " + name)
        result = real(*given)
        reach("after " + name)
        return result
    setattr(owner, name, function)
watch(train, "evaluate"), watch(os, "replace"), watch(train, "report")
train.main()
"""
