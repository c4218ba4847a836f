"""Stopping and resuming."""

import os
import re
import signal

import numpy as np
import pytest
from helpers import ON_CPU, STOP, TEXT, TINY, Folder, assert_same_run, epochs, losses
from helpers import refused, run_log, unix

CHANGES = dict(ctx_len=8, n_emb=32, n_heads=4, n_layers=2, dropout=0.1, batch_size=8, lr=2e-2,
               warmup_steps=4, weight_decay=0.2, beta1=0.8, beta2=0.95, max_norm=2.0, seed=1)


@unix
def test_a_run_stopped_again_and_again_equals_one_without_a_break(folder, tmp_path_factory):
    whole = Folder(tmp_path_factory.mktemp("whole"))
    for each in (folder, whole):
        each.edit(num_epochs=5, dropout=0.2)
    unbroken = whole.run()
    assert epochs(unbroken.stdout) == [0, 1, 2, 3, 4]

    together, resumed = [], []
    for moment, n, sent, shown in [
            ("measuring", 5, "SIGKILL", [0]),  # all steps of epoch 1 are done, and lost
            ("before saving", 2, "SIGKILL", []),  # between the model and the checkpoint
            ("before saving", 1, "SIGINT", []),
            ("measuring", 3, "SIGINT", [1]),
            ("after saving", 2, "SIGKILL", []),  # epoch 2 is saved but not announced
            ("announcing", 1, "SIGKILL", [3])]:  # what is announced is saved
        arguments = ["--resume"] if together else []
        stopped = folder.run(*arguments, code=STOP.format(moment=moment, n=n, signal=sent))
        if arguments:
            saved = re.search(r"^Resuming after epoch (\d+), val = (\S+)$", stopped.stdout, re.M)
            resumed.append((int(saved[1]), float(saved[2])))
        assert epochs(stopped.stdout) == shown, (moment, stopped.stderr)
        together += losses(stopped.stdout)
        if sent == "SIGINT":
            assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
            assert "stopped" in stopped.stderr
        else:
            assert stopped.returncode == -signal.SIGKILL
    rest = folder.run("--resume")
    together += losses(rest.stdout)

    assert epochs(rest.stdout) == [4]
    if ON_CPU:
        missing = losses(unbroken.stdout)[2:3]  # epoch 2, which was not announced
        assert sorted(together + missing) == losses(unbroken.stdout)
        vals = [(n, val) for n, _, val in losses(unbroken.stdout)]
        assert resumed == [vals[0], vals[0], vals[0], vals[1], vals[2]]
    assert_same_run(folder, whole)
    assert len(run_log(folder)) == 1 and "previous.safetensors" not in folder.files()


@unix
def test_a_compiled_run_is_resumed_as_exactly(folder, tmp_path_factory, compiled):
    whole = Folder(tmp_path_factory.mktemp("whole"))
    for each in (folder, whole):
        each.edit(dropout=0.2)
    stop = STOP.format(moment="measuring", n=5, signal="SIGKILL")
    unbroken, stopped = whole.run(compiled=True), folder.run(code=stop, compiled=True)
    rest = folder.run("--resume", compiled=True)
    assert epochs(stopped.stdout) == [0] and epochs(rest.stdout) == [1], rest.stderr
    if ON_CPU:
        assert losses(stopped.stdout + rest.stdout) == losses(unbroken.stdout)
    assert_same_run(folder, whole)


@unix
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_run_stopped_in_its_first_epoch_loses_nothing_and_is_not_confused(trained, n):
    """Killed as it saves: the previous model, then the new model, then the checkpoint."""
    before = trained.files()
    trained.edit(lr=2e-2)
    stopped = trained.run(code=STOP.format(moment="before saving", n=n, signal="SIGKILL"))
    assert stopped.returncode == -signal.SIGKILL and epochs(stopped.stdout) == []
    after = trained.files()
    assert all(after[name] == before[name] for name in ("runs.jsonl", "completions.txt"))
    # No checkpoint of the run before may remain beside a model of this one.
    assert "checkpoint.safetensors" not in after
    kept = {1: "model.safetensors"}.get(n, "previous.safetensors")
    assert after[kept] == before["model.safetensors"]
    assert ("model.safetensors" in after) == (n != 2)
    trained.edit(lr=2e-2, num_epochs=3)  # or it might refuse because the run is finished
    resumed = trained.run("--resume")
    assert resumed.returncode == 1 and "checkpoint.safetensors" in resumed.stderr
    assert trained.files() == after


def test_two_runs_in_one_folder(folder, command, monkeypatch):
    """A whole run happens while the first one is about to save."""
    others, replace = [], os.replace

    def slow_replace(old, new):
        if not others:
            others.append(folder.run())
        replace(old, new)

    monkeypatch.setattr(os, "replace", slow_replace)
    folder.edit(seed=1)
    output, status = command()
    assert status == 0 and epochs(output) == epochs(others[0].stdout) == [0, 1], others[0].stderr
    assert len(run_log(folder)) == 2 and not list(folder.path.glob("unfinished-*"))


@pytest.mark.parametrize("name, value", CHANGES.items())
def test_resume_refuses_other_settings(trained, tiny, command, name, value):
    tiny(num_epochs=3, **{name: value})
    line = refused(trained, command, "--resume")
    assert re.search(rf"\b{name}\W+{TINY[name]}\b.*\b{value}\b", line)
    assert not any(re.search(rf"\b{other}\b", line) for other in CHANGES.keys() - {name})


def test_resume_refuses_a_finished_run_and_another_text(trained, tiny, command):
    assert "num_epochs" in refused(trained, command, "--resume")
    tiny(num_epochs=3)
    trained.write("input.txt", TEXT[:-3] + TEXT[-2] + TEXT[-3] + "\n")
    assert "input.txt" in refused(trained, command, "--resume")


def steps_reported(output):
    found = re.findall(r"^step ([\d,]+)/([\d,]+), .*?([\d,.]+) tokens/s, ([\d.]+) min left",
                       output, re.M)
    return [tuple(float(number.replace(",", "")) for number in row) for row in found]


def test_resume_with_more_epochs_and_what_is_told_of_time(folder, tiny, command, clock):
    first = steps_reported(command()[0])
    steps = int(first[0][1]) // 2  # in an epoch
    assert [row[:2] for row in first] == [(step, 2 * steps) for step in range(2, 2 * steps + 1)]
    tiny(num_epochs=4, temperature=0.5, top_k=5, max_new_tokens=30)
    output, status = command("--resume")
    second = steps_reported(output)
    assert status == 0 and epochs(output) == [2, 3]
    assert [row[:2] for row in second] == [
        (step, 4 * steps) for step in range(2 * steps + 2, 4 * steps + 1)]
    for step, total, speed, minutes in first + second:
        assert speed == 2  # of 4 * 12 tokens in 20 seconds, rounded; the first step, which
        assert abs(minutes - (total - step) / 3) < 0.06  # compiles, does not count
    one, two = run_log(folder)
    assert abs(one["minutes"] - (1000 + (2 * steps - 1) * 20) / 60) < 0.06
    assert abs(two["minutes"] - 2 * one["minutes"]) < 0.11  # of all four epochs
    assert len(two["history"]) == 4 and len(folder.read("completions.txt")) == 30


def test_a_pipe_hears_of_progress_every_quarter_of_a_minute(folder, command, clock):
    clock.seconds = 1
    output, _ = command()
    steps = [row[0] for row in steps_reported(output)]
    assert len(steps) >= 2 and set(np.diff(steps)) == {15} and "\r" not in output
