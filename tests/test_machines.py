"""Two processes under mlx.launch train the model that one process trains alone."""

import itertools
import os
import random
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import train
from helpers import OTHER_TEXT, TEXT, Folder, epochs, losses, named, run_log

LAUNCH = Path(sys.executable).with_name("mlx.launch")
two_processes = pytest.mark.skipif(not LAUNCH.exists(), reason="no mlx.launch beside this python")
# The launcher reads its input. From a closed one it would read in a busy loop.
SILENCE, _never_written_to = os.pipe()
# Ports of its own for each launch: another suite may run on this machine at the same time.
PORTS = itertools.count(random.randrange(10_000, 30_000, 100), 2)


# Each machine trains on half of the rows.
HALVES = """
real = train.loss_fn
def loss_fn(model, x, y):
    assert not model.training or len(x) == train.batch_size // 2
    return real(model, x, y)
train.loss_fn = loss_fn
"""


def launch(folder, *arguments, code):
    """Runs code in two processes, which may ask for their `rank`."""
    folder.write("launched.py", f"import os, train\nrank = int(os.environ['MLX_RANK'])\n{code}\n")
    (folder.path / "tmp").mkdir(exist_ok=True)  # the launcher leaves files there
    launcher = [str(LAUNCH), "-n", "2", "--backend", "ring", "--starting-port", str(next(PORTS))]
    return folder.run(*arguments, script="launched.py", launcher=launcher, stdin=SILENCE,
                      variables={"TMPDIR": str(folder.path / "tmp")})


@two_processes
@pytest.mark.parametrize("second", [".", "second"], ids=["one folder", "two folders"])
def test_two_machines_take_the_same_first_steps_as_one(folder, other_folder, second):
    """Later steps may differ, as rounding grows."""
    (folder.path / "second").mkdir()
    for each in (folder, other_folder, Folder(folder.path / "second")):
        each.write("input.txt", TEXT[:450])  # eight steps
        each.edit(num_epochs=1)
    one = other_folder.run()
    two = launch(folder, code=f"{HALVES}\nos.chdir(['.', {second!r}][rank]); train.main()")
    assert two.returncode == 0, two.stderr
    assert len(two.stdout.splitlines()) == len(one.stdout.splitlines())  # one set of lines
    assert np.allclose(losses(two.stdout), losses(one.stdout), atol=2e-4)
    assert set(folder.files()) == {*other_folder.files(), "launched.py"}
    assert len(run_log(folder)) == 1 and len(os.listdir("second")) == 2
    ours, theirs = (named(train.load(each.path / "checkpoint.safetensors")[0])
                    for each in (folder, other_folder))  # the gradients of all steps, in m and v
    assert ours.keys() == theirs.keys()
    assert all(np.allclose(ours[name], theirs[name], atol=2e-3) for name in ours)
    if second == ".":
        again = launch(folder, "--resume", code="train.num_epochs = 2; train.main()")
        assert epochs(again.stdout) == [1], again.stderr


@two_processes
@pytest.mark.parametrize("arguments, difference, words", [
    ([], "train.batch_size = 5", "batch_size = 5"),
    ([], "if rank == 1: train.lr = 0.5", "differ"),
    ([], "if rank == 0: os.chdir('second')", "differ"),
    (["--resume"], "train.num_epochs = 3\nif rank == 1: os.chdir('second')", "checkpoint")],
    ids=["batch", "settings", "texts", "no checkpoint"])
def test_what_two_processes_refuse(trained, arguments, difference, words):
    before = trained.files()
    (trained.path / "second").mkdir()
    trained.write("second/input.txt", TEXT if arguments else OTHER_TEXT)
    result = launch(trained, *arguments, code=f"{difference}\ntrain.main()")
    lines = [line for line in result.stderr.splitlines() if "train.py: " in line]
    assert lines and all(words in line for line in lines), result.stderr
    assert epochs(result.stdout) == [] and not list(trained.path.glob("*/*.safetensors"))
    assert {**before, "launched.py": trained.read("launched.py")} == trained.files()


def test_no_other_backend_than_ring_is_started(folder, command, watch):
    """Without a name, MLX would start MPI where it is installed, for a single process as well."""
    started = watch(mx.distributed, "init")
    assert command()[1] == command("--sample", "7")[1] == 0
    assert started and all(backend == ["ring"] for *backend, _ in started)
