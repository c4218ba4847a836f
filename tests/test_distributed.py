"""Two processes under mlx.launch train the model that one process trains alone."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from test_run import EPOCH, epochs, interrupted, read_until, saved_epoch

LAUNCH = Path(sys.executable).with_name("mlx.launch")
# Like a terminal at which nobody types. At a closed input the launcher would read in a busy loop,
# and an interrupt in the midst of that can leave it waiting for itself for ever.
SILENCE, _never_written_to = os.pipe()


@pytest.fixture
def folder(folder):
    """A model and an epoch that are small even for the tests: the exchange takes its time."""
    folder.settings.update(n_layers=1, batch_size=16)
    folder.edit()
    yield folder
    for rank in (0, 1):  # a test that failed must not leave processes behind
        if left := pid(folder, rank):
            os.kill(left, signal.SIGKILL)


def launched(folder, *arguments):
    command = folder.command(*arguments)
    return {**command, "args": [LAUNCH, "-n", "2", *command["args"]], "stdin": SILENCE,
            "start_new_session": True}


def launch(folder, *arguments):
    return subprocess.run(**launched(folder, *arguments), capture_output=True, timeout=120)


def test_two_processes_equal_one(folder):
    alone = epochs(folder.run())
    weights = mx.load(str(folder.path / "model.safetensors"))
    for name in ("model.safetensors", "checkpoint.safetensors", "completions.txt"):
        (folder.path / name).unlink()
    # Each process also notes all its weights and its optimizer state after every epoch.
    end = "        yield epoch, losses.mean().item(), evaluate(model, val_tokens)\n"
    assert folder.source.count(end) == 1
    note = ("        with open(f'weights.{world.rank()}', 'a') as file:\n"
            "            for name, w in tree_flatten([model.parameters(), optimizer.state]):\n"
            "                print(name, np.array(w).tobytes().hex(), file=file)\n")
    folder.source = folder.source.replace(end, note + end)
    folder.edit()
    result = launch(folder)
    together = epochs(result)
    assert len(together) == len(alone) == 2  # one set of lines
    assert np.allclose(np.array(together, float), np.array(alone, float), atol=1.01e-4)
    assert result.stdout.count("parameters\n") == result.stdout.count("  val ") == 1
    notes = [(folder.path / f"weights.{rank}").read_text() for rank in (0, 1)]
    assert notes[0] == notes[1] and len(notes[0]) > 10_000
    assert set(folder.files()) == {"input.txt", "completions.txt", "model.safetensors",
                                   "checkpoint.safetensors", "weights.0", "weights.1"}
    after = mx.load(str(folder.path / "model.safetensors"))
    assert all(np.abs(np.array(after[n] - weights[n])).max() < 1e-3 for n in weights)


def test_dropout_differs_between_processes(folder):
    # Both halves of each batch are the same rows, so with the same dropout the mean of the two
    # gradients would be each of them, and the losses those of one process.
    share = "[world.rank() :: world.size()]"
    assert folder.source.count(share) == 2
    folder.source = folder.source.replace(share, "[: batch_size // 2]")
    folder.edit(dropout=0.5, num_epochs=1)
    together = epochs(launch(folder))
    assert epochs(folder.run())[0][1] != together[0][1]


def test_resume_under_the_launcher(folder):
    folder.edit(num_epochs=4, dropout=0.2)
    whole = epochs(launch(folder))
    folder.edit(num_epochs=4, dropout=0.2, temperature=0.5)
    process = subprocess.Popen(**launched(folder), stdout=subprocess.PIPE)
    read_until(process, "Epoch 2")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for rank in (0, 1):
        wait_until_gone(folder, rank)
    rest = epochs(launch(folder, "--resume"))
    assert 1 <= len(rest) <= 2 and rest == whole[-len(rest) :]


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


linux = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds processes in /proc")


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
        else:
            os.kill(pid(folder, 0), signal.SIGINT)

    output, _ = interrupted(process, interrupt)
    for rank in (0, 1):
        wait_until_gone(folder, rank)
    if whom == "first process":  # else the launcher is gone before it can pass this on
        assert re.search(r"train.py: stopped. Epochs 0 to \d+ are saved", output)
    assert not list(folder.path.glob("*.tmp*"))
    done = saved_epoch(folder) + 1
    folder.edit(num_epochs=done + 1)
    assert [int(epoch) for epoch, _, _ in epochs(launch(folder, "--resume"))] == [done]


def test_a_batch_that_cannot_be_shared(folder):
    folder.edit(batch_size=5)
    result = launch(folder)
    lines = [line for line in result.stderr.splitlines() if line.startswith("train.py")]
    assert lines == ["train.py: batch_size = 5 must be a multiple of the 2 processes"]
    assert not EPOCH.findall(result.stdout) and set(folder.files()) == {"input.txt"}
