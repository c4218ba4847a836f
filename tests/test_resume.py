"""Stopping and resuming."""

import re
import signal

import pytest
from helpers import ON_CPU, OTHER_TEXT, STOP, TINY, assert_same_run, epochs, losses, refused
from helpers import run_log, unix


@unix
def test_a_run_stopped_again_and_again_equals_one_without_a_break(folder, other_folder):
    for each in (folder, other_folder):
        each.edit(num_epochs=5, dropout=0.2)
    unbroken = losses(other_folder.run().stdout)
    together, resumed = [], []
    for moment, n, sent, shown in [
            ("before evaluate", 5, "SIGKILL", [0]),  # all steps of epoch 1 are done, and lost
            ("before replace", 2, "SIGKILL", []),  # between the model and the checkpoint
            ("before evaluate", 3, "SIGINT", [1]),
            ("after replace", 2, "SIGKILL", []),  # epoch 2 is saved but not announced
            ("after report", 1, "SIGKILL", [3]),  # what is announced is saved
            ("never", 1, "SIGKILL", [4])]:
        code = STOP.format(moment=moment, n=n, signal=sent)
        stopped = folder.run(*(["--resume"] if together else []), code=code)
        resumed += re.findall(r"^Resuming after epoch (\d+), val = (\S+)$", stopped.stdout, re.M)
        assert epochs(stopped.stdout) == shown, (moment, stopped.stderr)
        together += losses(stopped.stdout)
        if sent == "SIGINT":
            assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
            assert "stopped" in stopped.stderr
        elif moment != "never":
            assert stopped.returncode == -signal.SIGKILL
    assert [int(epoch) for epoch, _ in resumed] == [0, 0, 1, 2, 3]
    if ON_CPU:
        assert together == [epoch for epoch in unbroken if epoch[0] != 2]
        assert all(float(val) == unbroken[int(epoch)][2] for epoch, val in resumed)
    assert_same_run(folder, other_folder)
    assert len(run_log(folder)) == 1 and "previous.safetensors" not in folder.files()


@unix
def test_a_compiled_run_is_resumed_as_exactly(folder, other_folder, compiled):
    for each in (folder, other_folder):
        each.edit(dropout=0.2)
    stop = STOP.format(moment="before evaluate", n=5, signal="SIGKILL")
    unbroken, stopped = other_folder.run(compiled=True), folder.run(code=stop, compiled=True)
    rest = folder.run("--resume", compiled=True)
    assert epochs(stopped.stdout) == [0] and epochs(rest.stdout) == [1], rest.stderr
    if ON_CPU:
        assert losses(stopped.stdout + rest.stdout) == losses(unbroken.stdout)
    assert_same_run(folder, other_folder)


@unix
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_run_stopped_in_its_first_epoch_loses_nothing_and_is_not_confused(trained, n):
    """Killed as it saves: the previous model, then the new model, then the checkpoint."""
    before = trained.files()
    trained.edit(lr=2e-2)
    stopped = trained.run(code=STOP.format(moment="before replace", n=n, signal="SIGKILL"))
    assert stopped.returncode == -signal.SIGKILL and epochs(stopped.stdout) == []
    after = trained.files()
    assert all(after[name] == before[name] for name in ("runs.jsonl", "completions.txt"))
    # No checkpoint of the run before may remain beside a model of this one.
    assert "checkpoint.safetensors" not in after
    kept = "model.safetensors" if n == 1 else "previous.safetensors"
    assert after[kept] == before["model.safetensors"]
    assert ("model.safetensors" in after) == (n != 2)
    trained.edit(lr=2e-2, num_epochs=3)  # or it might refuse because the run is finished
    assert "checkpoint.safetensors" in trained.run("--resume").stderr and trained.files() == after


CHANGES = dict(ctx_len=8, n_emb=32, n_heads=4, n_layers=2, dropout=0.1, batch_size=4, lr=2e-2,
               warmup_steps=4, weight_decay=0.2, beta1=0.8, beta2=0.95, max_norm=2.0, seed=1)


@pytest.mark.parametrize("name, value", CHANGES.items())
def test_resume_refuses_other_settings(trained, tiny, command, name, value):
    tiny(num_epochs=3, **{name: value})
    line = refused(trained, command, "--resume")
    assert re.search(rf"\b{name}\W+{TINY[name]}\b.*\b{value}\b", line)
    assert not any(re.search(rf"\b{other}\b", line) for other in CHANGES.keys() - {name})


def test_resume_refuses_a_finished_run_and_another_text(trained, tiny, command):
    assert "num_epochs" in refused(trained, command, "--resume")
    tiny(num_epochs=3)
    trained.write("input.txt", OTHER_TEXT)
    assert "input.txt" in refused(trained, command, "--resume")


def steps_reported(output):
    """Of each line of progress: the step, the last step, the speed, and the minutes left."""
    found = re.findall(r"^step ([\d,]+)/([\d,]+), .*?([\d,.]+) tokens/s, ([\d.]+) min left",
                       output, re.M)
    return [tuple(float(number.replace(",", "")) for number in row) for row in found]


def test_resume_with_more_epochs_and_what_is_told_of_time(folder, tiny, command, steps):
    steps.seconds = 1  # time for a line of progress after each step
    first = steps_reported(command()[0])
    n = len(steps.rows)  # in two epochs
    tiny(num_epochs=4, temperature=0.5, top_k=5, max_new_tokens=30)
    output, status = command("--resume")
    assert status == 0 and epochs(output) == [2, 3]
    second = steps_reported(output)
    assert [row[:2] for row in first] == [(step, n) for step in range(2, n + 1)]
    assert [row[:2] for row in second] == [(step, 2 * n) for step in range(n + 2, 2 * n + 1)]
    for step, total, speed, minutes in first + second:
        assert speed == 8 * 12  # tokens in a step; the first one, which compiles, does not count
        assert abs(minutes - (total - step) / 60) < 0.06
    one, two = run_log(folder)
    assert abs(one["minutes"] - (1000 + n - 1) / 60) < 0.06
    assert abs(two["minutes"] - 2 * one["minutes"]) < 0.11  # of all four epochs
    assert len(two["history"]) == 4 and len(folder.read("completions.txt")) == 30
