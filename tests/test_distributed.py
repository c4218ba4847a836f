"""Two processes under mlx.launch train the model that one process trains alone."""

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import train
from conftest import TEXT, Folder
from mlx.utils import tree_flatten
from test_run import (AFTER_AN_EPOCH, EPOCH, STOPPED, arrays, epochs, interrupted, read_until,
                      saved_epoch)

LAUNCH = Path(sys.executable).with_name("mlx.launch")
pytestmark = pytest.mark.skipif(not LAUNCH.exists(), reason="no mlx.launch beside this python")
# Like a terminal at which nobody types. At a closed input the launcher would read in a busy loop,
# and an interrupt in the midst of that can leave it waiting for itself for ever.
SILENCE, _never_written_to = os.pipe()
# Ports of its own for each launch: another suite may run on this machine at the same time.
PORTS = itertools.count(random.randrange(10_000, 30_000, 100), 2)


linux = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds processes in /proc")


@pytest.fixture
def folder(folder):
    """A model and an epoch that are small even for the tests: the exchange takes its time."""
    folder.settings.update(batch_size=16)
    folder.edit()
    yield folder
    for rank in (0, 1):  # a test that failed must not leave processes behind
        if left := pid(folder, rank):
            os.kill(left, signal.SIGKILL)


def launched(folder, *arguments, before=""):
    """As Folder.command, for two processes. The code `before` knows which of them it is in."""
    command = folder.command(*arguments)
    if before:
        folder.write("wrapped.py", f"import os, sys, train\nrank = int(os.environ['MLX_RANK'])\n"
                                   f"{before}\ntrain.main()\n")
        command["args"][1] = "wrapped.py"
    launcher = [LAUNCH, "-n", "2", "--starting-port", str(next(PORTS))]
    return {**command, "args": [*launcher, *command["args"]], "stdin": SILENCE,
            "start_new_session": True}


def launch(folder, *arguments, before=""):
    return subprocess.run(**launched(folder, *arguments, before=before), capture_output=True,
                          timeout=120)


NOTING = """
from mlx.utils import tree_flatten
evaluate, make_optimizer, kept = train.evaluate, train.make_optimizer, []
def noting(model, tokens, loss_fn=train.loss_fn):
    with open(f"weights.{rank}", "a") as file:
        for name, w in tree_flatten([model.parameters(), kept[0].state]):
            print(name, train.np.array(w).tobytes().hex(), file=file)
    return evaluate(model, tokens, loss_fn)
def keeping(steps):
    kept.append(make_optimizer(steps))
    return kept[0]
train.evaluate, train.make_optimizer = noting, keeping
"""


@linux
def test_two_processes_equal_one(folder):
    alone = epochs(folder.run())
    weights = arrays(folder.read("model.safetensors"))
    for name in ("model.safetensors", "completions.txt"):
        (folder.path / name).unlink()
    # Each process also notes all its weights and its optimizer's state after every epoch.
    result = launch(folder, before=NOTING)
    together = epochs(result)
    assert len(together) == len(alone) == 2  # one set of lines
    assert np.allclose(np.array(together, float), np.array(alone, float), atol=1.01e-4)
    assert result.stdout.count("parameters\n") == result.stdout.count("  val ") == 1
    notes = [(folder.path / f"weights.{rank}").read_text() for rank in (0, 1)]
    assert notes[0] == notes[1] and len(notes[0]) > 10_000
    assert set(folder.files()) == {"input.txt", "completions.txt", "model.safetensors",
                                   "weights.0", "weights.1", "wrapped.py"}
    after = arrays(folder.read("model.safetensors"))
    assert all(np.abs(after[n] - weights[n]).max() < 1e-3 for n in weights)

    (folder.path / "model.safetensors").unlink()
    launch(folder, before=AFTER_AN_EPOCH.format(n=0, signal="SIGKILL"))
    for rank in (0, 1):
        wait_until_gone(folder, rank)
    rest = epochs(launch(folder, "--resume"))
    assert len(rest) == 1 and rest == together[1:]


def as_process(monkeypatch, rank, size=2):
    monkeypatch.setattr(mx.distributed, "init", lambda: SimpleNamespace(rank=lambda: rank,
                                                                        size=lambda: size))


@pytest.mark.parametrize("size, rows", [(2, 6), (2, 12), (3, 12), (4, 12)])
def test_processes_and_streams_share_all_rows(tiny, monkeypatch, size, rows):
    tiny(batch_size=rows)
    model = train.GPT(11)
    x, y = mx.random.randint(0, 11, (2, rows, 12))
    expected, expected_grads = nn.value_and_grad(model, train.loss_fn)(model, x, y)
    loss, sums = 0, {name: 0 for name, _ in tree_flatten(expected_grads)}
    for rank in range(size):
        as_process(monkeypatch, rank, size)
        part, grads = nn.value_and_grad(model, train.shared_loss)(model, x, y)
        loss += part.item() / size
        for name, grad in tree_flatten(grads):
            sums[name] += np.array(grad) / size
    assert abs(loss - expected.item()) < 1e-5
    for name, grad in tree_flatten(expected_grads):
        assert np.abs(sums[name] - np.array(grad)).max() < 1e-6, name


def test_dropout_differs_between_processes(tiny, monkeypatch):
    x = mx.array(np.repeat(np.arange(12)[None] % 11, 6, axis=0))  # everyone has the same rows
    for dropout, different in ((0.0, False), (0.5, True)):
        tiny(dropout=dropout, batch_size=6)
        mx.random.seed(0)
        model, losses = train.GPT(11), []
        for rank in (0, 1):
            as_process(monkeypatch, rank)
            mx.random.seed(1)
            losses.append(train.shared_loss(model, x, x).item())
        assert (abs(losses[0] - losses[1]) > 1e-4) == different


def pid(folder, rank):
    """The process of that rank which runs in this folder, or None."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (os.readlink(process / "cwd") == str(folder.path)
                    and f"MLX_RANK={rank}\0".encode() in (process / "environ").read_bytes()
                    and (process / "stat").read_text().split()[2] != "Z"):
                return int(process.name)
        except OSError:
            continue


def wait_until_gone(folder, rank):
    end = time.monotonic() + 30
    while pid(folder, rank):
        assert time.monotonic() < end, f"process {rank} hangs"
        time.sleep(0.05)


@linux
@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_process_dies_the_other_ends_too(folder, rank):
    folder.edit(num_epochs=10_000)
    process = subprocess.Popen(**launched(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    read_until(process, "Epoch 1")
    os.kill(pid(folder, rank), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert f"Node with rank {rank} exited with code -9" in output  # in the launcher's words
    wait_until_gone(folder, 1 - rank)
    assert saved_epoch(folder) >= 0


@linux
@pytest.mark.parametrize("whom", ["first process", "everybody"])
def test_ctrl_c_under_the_launcher(folder, whom):
    folder.edit(num_epochs=10_000)
    process = subprocess.Popen(**launched(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    read_until(process, "Epoch 1")

    def interrupt():
        if whom == "everybody":  # as a terminal does
            os.killpg(process.pid, signal.SIGINT)
        elif first := pid(folder, 0):  # else it has ended, and the launcher is about to
            os.kill(first, signal.SIGINT)

    output, _ = interrupted(process, interrupt)
    for rank in (0, 1):
        wait_until_gone(folder, rank)
    if whom == "first process":  # else the launcher is gone before it can pass this on
        ((held, _),) = re.findall(STOPPED, output)  # said once
        assert int(held) >= 1
    assert not list(folder.path.glob("tmp-*"))
    if whom == "everybody":
        done = saved_epoch(folder) + 1
        folder.edit(num_epochs=done + 1)
        assert [int(epoch) for epoch, _, _ in epochs(launch(folder, "--resume"))] == [
            done]


def said(result):
    """What the script said under the launcher before it refused, which is said by one process."""
    lines = [line for line in result.stderr.splitlines() if "train.py: " in line]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    assert not EPOCH.findall(result.stdout)
    return lines[0]


def test_a_batch_that_cannot_be_shared(folder):
    folder.edit(batch_size=5)
    line = said(launch(folder))
    assert line == "train.py: batch_size = 5 must be a multiple of 2 processes"
    assert set(folder.files()) == {"input.txt"}


@pytest.mark.parametrize("difference, words", [
    ("if rank == {}: train.seed = 1", "the processes differ"),
    ("if rank == {}: os.chdir('other')", "the processes differ"),
    ("if rank == {}: os.chdir('empty')", "'input.txt'"),
    ("if rank == {}: train.lr = '1'", "lr = '1' must be")])
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_differ(folder, difference, words, rank):
    for name in ("other", "empty"):
        (folder.path / name).mkdir()
    folder.write("other/input.txt", TEXT[:-3] + TEXT[-2] + TEXT[-3] + "\n")  # the same characters
    assert words in said(launch(folder, before=difference.format(rank)))
    assert not list(folder.path.rglob("*.safetensors"))


@pytest.mark.parametrize("rank", [0, 1])
def test_what_only_one_process_refuses_is_said_once(folder, rank):
    (folder.path / "other" / "former.safetensors").mkdir(parents=True)
    folder.write("other/input.txt", TEXT)
    result = launch(folder, before=f"if rank == {rank}: os.chdir('other')")
    assert "Is a directory: 'former.safetensors'" in said(result)
    assert not list(folder.path.rglob("model.safetensors"))


def test_processes_that_resume_different_runs(trained):
    trained.edit(num_epochs=3)
    before = trained.read("model.safetensors")
    (trained.path / "other").mkdir()
    trained.write("other/input.txt", TEXT)
    other = Folder(trained.path / "other")  # where the same run is an epoch behind
    other.run(before=AFTER_AN_EPOCH.format(n=0, signal="SIGKILL"))
    assert saved_epoch(other) == saved_epoch(trained) - 1
    for rank in (0, 1):
        line = said(launch(trained, "--resume", before=f"if rank == {rank}: os.chdir('other')"))
        assert "the processes differ" in line and trained.read("model.safetensors") == before
    (other.path / "model.safetensors").unlink()
    line = said(launch(trained, "--resume", before="if rank == 1: os.chdir('other')"))
    assert "model.safetensors is missing," in line and trained.read("model.safetensors") == before


def test_what_all_processes_refuse_is_said_once(folder):
    (folder.path / "input.txt").unlink()
    assert "'input.txt'" in said(launch(folder))
    assert "model.safetensors is missing," in said(launch(folder, "--sample", "7"))


def test_sample_under_the_launcher_writes_one_text(trained):
    alone = trained.run("--sample", "7 sheep").stdout
    result = launch(trained, "--sample", "7 sheep")
    assert result.returncode == 0 and result.stdout.count(alone) == 1
    assert result.stdout.count("7 sheep") == alone.count("7 sheep")
