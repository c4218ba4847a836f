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
from helpers import TEXT, Folder, epochs, losses, named, run_log

LAUNCH = Path(sys.executable).with_name("mlx.launch")
two_processes = pytest.mark.skipif(not LAUNCH.exists(), reason="no mlx.launch beside this python")
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
import train
rows = [0]

def call(self, tokens, *rest, real=train.GPT.__call__):
    rows[0] += len(tokens) * self.training
    return real(self, tokens, *rest)

train.GPT.__call__ = call
if rank == 1:
    os.chdir({other!r})
train.main()
open({rows!r} + str(rank), 'w').write(str(rows[0]))
"""


@two_processes
@pytest.mark.parametrize("other", [".", "other"], ids=["one folder", "two folders"])
def test_two_machines_take_the_same_first_steps_as_one(folder, tmp_path_factory, other):
    """Later steps may differ, as rounding grows."""
    alone = Folder(tmp_path_factory.mktemp("alone"))
    (folder.path / "other").mkdir()
    for each in (folder, alone, Folder(folder.path / "other")):
        each.write("input.txt", TEXT[:450])  # eight steps
        each.edit(num_epochs=1)
    one = alone.run()
    count = COUNT_ROWS.format(other=other, rows=str(folder.path / "rows"))
    two = launch(folder, code=count)
    assert two.returncode == 0, two.stderr
    assert len(two.stdout.splitlines()) == len(one.stdout.splitlines())  # one set of lines
    assert np.allclose(losses(two.stdout), losses(one.stdout), atol=2e-4)
    steps = train.count_batches(range(450 * 9 // 10), 12, 4)
    assert [int(folder.read(f"rows{rank}")) for rank in (0, 1)] == [steps * 4 / 2] * 2
    assert set(folder.files()) == {*alone.files(), "launched.py", "rows0", "rows1"}
    assert len(run_log(folder)) == 1 and os.listdir("other") in (["input.txt", "train.py"],
                                                                 ["train.py", "input.txt"])
    ours, theirs = (named(train.load(each.path / "checkpoint.safetensors")[0])
                    for each in (folder, alone))  # the gradients of all steps, in m and v
    assert ours.keys() == theirs.keys()
    assert all(np.allclose(ours[name], theirs[name], atol=2e-3) for name in ours)
    if other == ".":
        again = launch(folder, "--resume", code="import train; train.num_epochs = 2; train.main()")
        assert epochs(again.stdout) == [1], again.stderr


@two_processes
@pytest.mark.parametrize("arguments, difference, words", [
    ([], "train.batch_size = 5", "batch_size = 5"),
    ([], "if rank == 1: train.lr = 0.5", "differ"),
    ([], "if rank == 0: os.chdir('other')", "differ"),
    (["--resume"], "train.num_epochs = 3\nif rank == 1: os.chdir('other')", "checkpoint")],
    ids=["batch", "settings", "texts", "no checkpoint"])
def test_what_two_processes_refuse(trained, arguments, difference, words):
    before = trained.files()
    (trained.path / "other").mkdir()
    swapped = TEXT[:-3] + TEXT[-2] + TEXT[-3] + "\n"
    trained.write("other/input.txt", TEXT if arguments else swapped)
    result = launch(trained, *arguments, code=f"import train\n{difference}\ntrain.main()")
    lines = [line for line in result.stderr.splitlines() if "train.py: " in line]
    assert lines and all(words in line for line in lines), result.stderr
    assert epochs(result.stdout) == []
    after = trained.files()
    del after["launched.py"]
    assert after == before and not list(trained.path.glob("*/*.safetensors"))


def test_no_other_backend_than_ring_is_started(folder, command, monkeypatch):
    """Without a name, MLX would start MPI where it is installed, for a single process as well."""
    asked, init = [], mx.distributed.init
    monkeypatch.setattr(mx.distributed, "init",
                        lambda *given, **named: asked.append(named) or init(*given, **named))
    assert command()[1] == command("--sample", "7")[1] == 0
    assert asked and all(named.get("backend") == "ring" for named in asked)
