"""Two processes under mlx.launch train the model that one process trains alone."""

import itertools
import os
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ON_CPU, TEXT, Folder
from test_run import CLOCK, arrays, assert_same_run, epochs, losses, run_log

LAUNCH = Path(sys.executable).with_name("mlx.launch")
pytestmark = pytest.mark.skipif(not LAUNCH.exists(), reason="no mlx.launch beside this python")
# The launcher reads its input. From a closed one it would read in a busy loop.
SILENCE, _never_written_to = os.pipe()
# Ports of its own for each launch: another suite may run on this machine at the same time.
PORTS = itertools.count(random.randrange(10_000, 30_000, 100), 2)


def launch(folder, *arguments, code="import train; train.main()"):
    """Runs code in two processes, which may ask for their `rank`."""
    folder.write("launched.py", f"import os\nrank = int(os.environ['MLX_RANK'])\n{code}\n")
    command = folder.command(*arguments)
    command["args"][1] = "launched.py"
    launcher = [str(LAUNCH), "-n", "2", "--backend", "ring", "--starting-port", str(next(PORTS))]
    (folder.path / "tmp").mkdir(exist_ok=True)  # the launcher leaves files there
    environment = {**command["env"], "TMPDIR": str(folder.path / "tmp")}
    return folder.run(args=[*launcher, *command["args"]], stdin=SILENCE, env=environment)


COUNT_ROWS = """
rows, random_numbers = 0, []

def call(self, tokens, *rest, real=train.GPT.__call__):
    global rows
    if self.training:
        rows += len(tokens)
        random_numbers.append(train.mx.random.uniform().item())  # as dropout would draw some
    return real(self, tokens, *rest)

train.GPT.__call__ = call
"""


def test_two_processes_take_the_same_first_steps_as_one(folder, tmp_path_factory):
    """Later ones need not be the same: what differs by rounding soon differs by more."""
    alone = Folder(tmp_path_factory.mktemp("alone"))
    for each in (folder, alone):
        each.write("input.txt", TEXT[:450])  # eight steps
        each.edit(num_epochs=1)
    one = alone.run()
    code = CLOCK.format(seconds=30).replace("train.main()", COUNT_ROWS + "train.main()")
    code += "\nprint(rows, random_numbers[0], file=open(f'rows.{rank}', 'w'))"
    two = launch(folder, code=code)
    assert two.returncode == 0, two.stderr
    said, said_alone = ([line for line in run.stdout.splitlines() if "min left" not in line]
                        for run in (two, one))
    assert len(said) == len(said_alone)  # one set of lines
    assert np.allclose(losses(two.stdout), losses(one.stdout), atol=2e-4)
    assert two.stdout.count("step 2 of ") == 1
    assert len(run_log(folder)) == 1
    assert set(folder.files()) == {*alone.files(), "launched.py", "rows.0", "rows.1"}
    steps = int(re.search(r"step 2 of (\d+)", two.stdout)[1])
    (rows, number), (other_rows, other_number) = (
        folder.read(f"rows.{rank}").split() for rank in (0, 1))
    assert int(rows) == int(other_rows) == steps * 4 / 2
    assert number != other_number

    # Adam's averages of the gradients and of their squares.
    ours, theirs = (arrays(each, "checkpoint.safetensors") for each in (folder, alone))
    assert ours.keys() == theirs.keys()
    averages = [name for name in ours if name.endswith((".m", ".v"))]
    assert len(averages) > 20
    for name in averages:
        assert np.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-6), name
        assert name.endswith("k_proj.bias.m") or np.abs(ours[name]).max() > 0


KEEP = """
import shutil, train
def replace(old, new, real=os.replace):
    real(old, new)
    if not os.path.exists(f"first/{new}"):
        shutil.copy(new, "first")
os.replace = replace
train.main()
"""


def test_two_processes_resume_exactly(folder):
    folder.edit(dropout=0.2)
    (folder.path / "first").mkdir()  # for the files of the first epoch
    whole = launch(folder, code=KEEP)
    assert epochs(whole.stdout) == [0, 1], whole.stderr
    broken = Folder(folder.path / "first")
    broken.edit(dropout=0.2)
    rest = launch(broken, "--resume")
    assert epochs(rest.stdout) == [1], rest.stderr
    if ON_CPU:
        assert losses(rest.stdout) == losses(whole.stdout)[1:]
    assert_same_run(broken, folder)


@pytest.mark.parametrize("arguments, difference, words", [
    ([], "train.batch_size = 5", "batch_size = 5"),
    ([], "if rank == 1: train.lr = 0.5", "differ"),
    ([], "if rank == 0: os.chdir('other')", "differ"),
    ([], "if rank == 1: os.chdir('empty')", "input.txt"),
    (["--resume"], "train.num_epochs = 3\nif rank == 1: os.chdir('other')", "checkpoint")],
    ids=["batch", "settings", "texts", "no input", "no checkpoint"])
def test_what_two_processes_refuse(trained, arguments, difference, words):
    before = trained.files()
    for name, text in (("other", TEXT[:-3] + TEXT[-2] + TEXT[-3] + "\n"), ("empty", None)):
        (trained.path / name).mkdir()
        if text:
            trained.write(f"{name}/input.txt", text if arguments == [] else TEXT)
    result = launch(trained, *arguments, code=f"import train\n{difference}\ntrain.main()")
    lines = [line for line in result.stderr.splitlines() if "train.py: " in line]
    assert lines and all(words in line for line in lines), result.stderr
    assert epochs(result.stdout) == []
    after = trained.files()
    del after["launched.py"]
    assert after == before and not list(trained.path.glob("*/*.safetensors"))
