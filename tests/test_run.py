"""Whole runs of train.py and what its command line does, on tiny settings and a small text.

What needs a process of its own (signals, pipes, terminals, a fresh Python) gets one, which takes
most of the time. All else calls train.main() in this process.
"""

import itertools
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
import reference
import train
from conftest import ON_CPU, SOURCE, TEXT, TINY, Folder, unix
from mlx.utils import tree_flatten

EPOCH = re.compile(r"^Epoch +(\d+) \| train = (\S+) \| val = (\S+) \|.* (\S+)$", re.M)
CHANGES = dict(ctx_len=8, n_emb=32, n_heads=4, n_layers=2, dropout=0.1, batch_size=8, lr=2e-2,
               warmup_steps=4, weight_decay=0.2, beta1=0.8, beta2=0.95, max_norm=2.0, seed=1)


def losses(output):
    """The number, the training loss, and the validation loss of each epoch that was printed."""
    return [(int(n), float(t), float(v)) for n, t, v, _ in EPOCH.findall(output)]


def epochs(output):
    return [n for n, _, _ in losses(output)]


def arrays(folder, name):
    return {key: np.array(array) for key, array in mx.load(str(folder.path / name)).items()}


def run_log(folder):
    return [json.loads(line) for line in folder.read("runs.jsonl").splitlines()]


def assert_same_run(folder, other):
    """The same weights, optimizer, and text: on a CPU, to the last bit."""
    for name in ("model.safetensors", "checkpoint.safetensors"):
        ours, theirs = arrays(folder, name), arrays(other, name)
        assert ours.keys() == theirs.keys()
        if ON_CPU:
            different = [key for key in ours if not np.array_equal(ours[key], theirs[key])]
            assert different == []
    if ON_CPU:
        assert folder.read("completions.txt") == other.read("completions.txt")


@pytest.fixture
def command(tiny, monkeypatch, capsys):
    """Runs the command line in this process. Returns what it printed, and its exit status."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        try:
            train.main()
        except SystemExit as end:
            return capsys.readouterr().out, end.code
        return capsys.readouterr().out, 0
    return run


@pytest.fixture
def here(folder, monkeypatch):
    """A folder with only the script and the text, as the current directory."""
    monkeypatch.chdir(folder.path)
    return folder


@pytest.fixture
def trained_here(trained, monkeypatch):
    """The same, after a run."""
    monkeypatch.chdir(trained.path)
    return trained


def refused(folder, command, *arguments):
    """Runs a command that must refuse, and change nothing. Returns its one-line message."""
    before = folder.files()
    output, status = command(*arguments)
    assert isinstance(status, str) and "\n" not in status  # which Python prints, and exits with 1
    assert not arguments or output == ""
    assert epochs(output) == [] and folder.files() == before
    return status


# A run


def test_a_run(finished_run):
    folder, result = finished_run
    output, lines = result.stdout, result.stdout.splitlines()
    assert result.stderr == ""
    for name, value in TINY.items():
        assert re.search(rf"\b{name}\W+{value}(?![\w.])", output), name
    assert f"{sum(w.size for w in arrays(folder, 'model.safetensors').values()):,}" in output
    uniform = math.log(len(set(TEXT)))
    assert f"{uniform:.4f}" in output

    untrained = re.search(r"^Untrained \| train = (\S+) \| val = (\S+)", output, re.M)
    assert all(abs(float(loss) - uniform) < 0.1 for loss in untrained.groups())
    assert epochs(output) == [0, 1]
    vals = [val for _, _, val in losses(output)]
    assert uniform - 0.2 > vals[0] > vals[1]
    for val, row in zip(vals, EPOCH.findall(output), strict=True):
        assert abs(float(row[3]) - math.exp(val)) < 0.06  # the perplexity
    written = [lines[i + 1].strip() for i, line in enumerate(lines) if " | val = " in line]
    assert len(set(written)) == 3 and all(set(text) <= set(TEXT) | {"⏎"} for text in written)

    text = folder.read("completions.txt").decode()
    assert len(text) == TINY["max_new_tokens"] and set(text) <= set(TEXT)
    end = output[output.index(f"\n{text}\n") :]
    assert all(name in end for name in ("model.safetensors", "completions.txt", "runs.jsonl"))
    assert {"checkpoint.safetensors", "model.safetensors"} <= set(folder.files())
    assert not list(folder.path.glob("unfinished-*")) and not list(folder.path.glob("former*"))
    (run,) = run_log(folder)
    assert TINY.items() <= run["settings"].items() and abs(run["best_val"] - vals[1]) < 1e-4


def saved_model(folder):
    """The model in model.safetensors: MLX's own load_weights can read it."""
    path = str(folder.path / "model.safetensors")
    _, metadata = mx.load(path, return_metadata=True)
    model = train.GPT(train.GPTConfig(**json.loads(metadata["notes"])["config"]))
    model.load_weights(path)
    model.eval()
    return model


VOCAB = sorted(set(TEXT))


def encoded(text):
    return np.array([VOCAB.index(char) for char in text])


def test_the_saved_model_is_that_of_the_last_line(finished_run, tiny):
    folder, result = finished_run
    model, boundary = saved_model(folder), len(TEXT) * 9 // 10
    for text, printed in zip((TEXT[:boundary], TEXT[boundary:]), losses(result.stdout)[-1][1:],
                             strict=True):
        assert abs(train.evaluate(model, encoded(text), train.loss_fn) - printed) < 1e-4


def test_training_and_validation_text_do_not_overlap(here, tiny):
    tokenizer, train_tokens, val_tokens, _ = train.load_data()
    assert tokenizer.vocab == VOCAB and len(train_tokens) == len(TEXT) * 9 // 10
    assert np.array_equal(np.concatenate([train_tokens, val_tokens]), encoded(TEXT))


def total_steps(epochs):
    """The steps of a run in tiny settings: one row less than there is place for."""
    rows = (len(TEXT) * 9 // 10 - 1) // TINY["ctx_len"] - 1
    return epochs * (rows // TINY["batch_size"])


def last_rates(folder):
    """The learning rates in the last step of a run."""
    found = arrays(folder, "checkpoint.safetensors")
    return [rate.item() for name, rate in found.items() if name.endswith("learning_rate")]


def test_the_learning_rate_falls_until_the_last_step(finished_run):
    rate = TINY["lr"] / total_steps(2)  # 0 would be the next step's
    assert last_rates(finished_run[0]) == pytest.approx([rate, rate], rel=1e-4)


@pytest.fixture
def batches(monkeypatch):
    """The first row of each batch that a run is trained on, in order."""
    seen = []

    def get_batches(tokens, ctx_len, batch_size, rng=None, real=train.get_batches):
        for x, y in real(tokens, ctx_len, batch_size, rng):
            if rng is not None:
                seen.append(x[0].tolist())
            yield x, y

    monkeypatch.setattr(train, "get_batches", get_batches)
    return seen


def test_batches_and_first_weights_depend_on_the_seed_and_the_epoch(here, tiny, command, batches):
    untrained = set()
    for seed in (0, 1):
        tiny(seed=seed)
        output, _ = command()
        untrained.add(re.search(r"^Untrained .*", output, re.M)[0])
    n = total_steps(1)
    assert len(batches) == 4 * n
    epochs = [sorted(batches[i : i + n]) for i in range(0, 4 * n, n)]
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    assert len(untrained) == 2


def test_a_model_is_trained_in_its_size_and_with_dropout(here, tiny, command):
    sizes = {name: TINY[name] for name in ("ctx_len", "n_emb", "n_heads")}
    weights = []
    for dropout in (0.5, 0.0):
        tiny(num_epochs=1, n_layers=2, dropout=dropout)
        assert command()[1] == 0
        weights.append(arrays(here, "model.safetensors"))
        notes = mx.load("model.safetensors", return_metadata=True)[1]["notes"]
        assert json.loads(notes)["config"] == {
            "vocab_size": len(VOCAB), **sizes, "n_layers": 2, "dropout": dropout}
    with_dropout, without = weights
    assert not any(np.array_equal(with_dropout[name], without[name]) for name in without)


def test_what_the_loop_suggests_to_put_there(folder):
    """The comment in the loop that prints and saves every so many steps, as code."""
    suggestion = re.search(r"( +)# Put here .*:\n((?:\1#     .*\n)+)", SOURCE)
    if not suggestion:
        pytest.skip("train.py has no comment that suggests what to put into the loop")
    code = re.sub(r"# {4} ", "", suggestion[2]).replace("500", "20")
    source = (folder.path / "train.py").read_text(encoding="utf-8")
    folder.write("train.py", source.replace(suggestion[0], code))
    result = folder.run()
    assert result.returncode == 0, result.stderr
    steps = re.findall(r"^step (\d+): loss (\d)", result.stdout, re.M)
    assert [int(step) for step, _ in steps] == list(range(10, total_steps(2) + 1, 10))
    model, _ = train.load_model(folder.path / "step20.safetensors")
    assert train.count_parameters(model) == train.count_parameters(saved_model(folder))


def test_the_best_weights_are_kept(here, tiny, command, monkeypatch):
    tiny(num_epochs=3)
    results = iter([5, 5, 1e6, 1e6, 1, 1, 3, 3])  # a huge loss must not overflow
    weights = []

    def evaluate(model, *_):
        model.eval()
        weights.append(tree_flatten(model.parameters(), destination={}))
        return next(results)

    monkeypatch.setattr(train, "evaluate", evaluate)
    output, status = command()
    assert status == 0 and [val for _, _, val in losses(output)] == [1e6, 1, 3]
    saved = arrays(here, "model.safetensors")
    assert saved.keys() == weights[5].keys()
    assert all(np.array_equal(saved[name], weights[5][name]) for name in saved)
    last = arrays(here, "checkpoint.safetensors")
    assert all(np.array_equal(last[f"model.{name}"], weights[7][name]) for name in saved)
    assert run_log(here)[-1]["best_val"] == 1
    assert command("--sample")[0].strip("\n") == here.read("completions.txt").decode().strip("\n")


NOTEBOOK = """
import sys
sys.argv = ["/somewhere/ipykernel_launcher.py", "-f", "/somewhere/kernel-1.json"]
with open("train.py", encoding="utf-8") as file:
    cells = file.read()
exec(compile(cells, "cells", "exec"), globals())  # in __main__, as a kernel does
"""
THREAD = """
import threading, mlx.core as mx, train
def work():
    train.train()
    mx.clear_streams()  # as MLX advises: or its own threads may end after the process has
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.parametrize("code", ["import train; train.train()", NOTEBOOK, THREAD],
                         ids=["function", "notebook", "thread"])
def test_every_way_to_train_gives_the_same(folder, finished_run, code):
    result = folder.run(code=code)
    assert (result.returncode, result.stderr) == (0, "")
    if ON_CPU:
        assert result.stdout == finished_run[1].stdout
    assert epochs(result.stdout) == [0, 1]
    assert_same_run(folder, finished_run[0])


IMPORT = """
import argparse, contextlib, dataclasses, json, math, os, pathlib, shutil, sys, time, zlib
import mlx.core as mx, mlx.nn, mlx.optimizers, mlx.utils, numpy
opened = []
sys.addaudithook(lambda event, arguments: opened.append(arguments[0]) if event == "open" else 0)
import train
own = [path for path in opened if not str(path).endswith((".py", ".pyc"))]
sys.exit(f"{own} {mx.get_peak_memory()}" if own or mx.get_peak_memory() else 0)
"""


def test_import_does_nothing(folder):
    (folder.path / "input.txt").unlink()
    result = folder.run(code=IMPORT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert folder.files() == {}


# Stopping and resuming

# Runs the script, and sends it a signal at the n-th of some moments.
STOP = """
import os, signal, train

moments = []

def reach(moment):
    moments.append(moment)
    if moment == {moment!r} and moments.count(moment) == {n}:
        os.kill(os.getpid(), signal.{signal})

def evaluate(*arguments, real=train.evaluate):
    reach("measuring")
    return real(*arguments)

def replace(old, new, real=os.replace):
    reach("before saving")
    real(old, new)
    reach("after saving")

def announce(*values, **options):
    print(*values, **dict(options, flush=True))
    if str(values[0] if values else "").startswith("Epoch"):
        reach("announcing")

train.evaluate, train.print, os.replace = evaluate, announce, replace
train.main()
"""


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
            assert "--resume" in stopped.stderr and stopped.stderr.strip().count("\n") == 0
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
    assert len(run_log(folder)) == 1 and "former.safetensors" not in folder.files()


@unix
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_run_stopped_in_its_first_epoch_loses_nothing_and_is_not_confused(trained, n):
    """Killed as it saves: the former model, then the new model, then the checkpoint."""
    before = trained.files()
    trained.edit(lr=2e-2)
    stopped = trained.run(code=STOP.format(moment="before saving", n=n, signal="SIGKILL"))
    assert stopped.returncode == -signal.SIGKILL and epochs(stopped.stdout) == []
    after = trained.files()
    assert all(after[name] == before[name] for name in ("runs.jsonl", "completions.txt"))
    # No checkpoint of the former run may remain beside a model of this one.
    assert ("checkpoint.safetensors" in after) == (n == 1)
    assert before["model.safetensors"] == after[
        "model.safetensors" if n == 1 else "former.safetensors"]
    assert (after["model.safetensors"] == before["model.safetensors"]) == (n < 3)
    trained.edit(lr=2e-2, num_epochs=3)  # or it might refuse because the run is finished
    resumed = trained.run("--resume")
    assert resumed.returncode != 0
    assert ("0.02" if n == 1 else "no checkpoint.safetensors") in resumed.stderr
    assert trained.files() == after


@unix
def test_two_runs_in_one_folder(folder):
    """The first one is halted as it saves, until the second one is done."""
    first = folder.start(STOP.format(moment="before saving", n=2, signal="SIGSTOP"))
    _, status = os.waitpid(first.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    folder.edit(seed=1)
    second = folder.run()
    first.send_signal(signal.SIGCONT)
    output, error = first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), error + second.stderr
    assert epochs(output) == epochs(second.stdout) == [0, 1] and len(run_log(folder)) == 2


def test_former_is_the_model_of_the_run_before(trained_here, tiny, command):
    first = trained_here.read("model.safetensors")
    tiny(num_epochs=1, seed=1)
    assert command()[1] == 0
    second = trained_here.read("model.safetensors")
    assert trained_here.read("former.safetensors") == first != second
    tiny(num_epochs=2)
    assert epochs(command("--resume")[0]) == [1]
    assert trained_here.read("former.safetensors") == first  # the same run went on


@pytest.mark.parametrize("name, value", CHANGES.items())
def test_resume_refuses_other_settings(trained_here, tiny, command, name, value):
    tiny(num_epochs=3, **{name: value})
    line = refused(trained_here, command, "--resume")
    assert re.search(rf"\b{name}\W+{TINY[name]}\b.*\b{value}\b", line)
    assert not any(re.search(rf"\b{other}\b", line) for other in CHANGES.keys() - {name})


def test_resume_refuses_a_finished_run_another_text_and_a_lost_model(trained_here, tiny, command):
    assert "num_epochs" in refused(trained_here, command, "--resume")
    tiny(num_epochs=3)
    trained_here.write("input.txt", TEXT[:-3] + TEXT[-2] + TEXT[-3] + "\n")
    assert "input.txt" in refused(trained_here, command, "--resume")
    trained_here.write("input.txt", TEXT)
    (trained_here.path / "model.safetensors").unlink()
    assert "model.safetensors" in refused(trained_here, command, "--resume")


# A fake clock: the first training step takes 1000 seconds, each later one so many, all else none.
CLOCK = """
import time, train
now = 0

def get_batches(tokens, ctx_len, batch_size, rng=None, real=train.get_batches):
    global now
    for batch in real(tokens, ctx_len, batch_size, rng):
        if rng is not None:
            now += {seconds} if now > 0 else 1000
        yield batch

train.get_batches, time.perf_counter = get_batches, lambda: now
train.main()
"""


def steps_reported(output):
    found = re.findall(r"^step (\d+) of (\d+)\b.*?([\d.]+) min", output, re.M)
    return [(int(step), int(total), float(minutes)) for step, total, minutes in found]


def test_resume_with_more_epochs(folder):
    """With a clock that makes the steps so slow that each is reported, even in a pipe."""
    clock = CLOCK.format(seconds=30)
    first = steps_reported(folder.run(code=clock).stdout)
    steps = first[0][1] // 2  # in an epoch
    assert [(step, total) for step, total, _ in first] == [
        (step, 2 * steps) for step in range(2, 2 * steps + 1)]  # the first one compiles
    folder.edit(num_epochs=4, temperature=0.5, top_k=5, max_new_tokens=30)
    result = folder.run("--resume", code=clock)
    assert result.returncode == 0 and epochs(result.stdout) == [2, 3]
    before = result.stdout[: result.stdout.index("Epoch")]
    assert re.search(r"num_epochs\b.* 2\b.* 4\b", before)  # the schedule is another one now
    second = steps_reported(result.stdout)
    assert [(step, total) for step, total, _ in second] == [
        (step, 4 * steps) for step in range(2 * steps + 2, 4 * steps + 1)]
    for step, total, minutes in first + second:
        assert abs(minutes - (total - step) / 2) < 0.06  # as if the first step had been like all
    assert len(folder.read("completions.txt")) == 30
    one, two = run_log(folder)
    assert abs(one["minutes"] - (1000 + (2 * steps - 1) * 30) / 60) < 0.06
    assert abs(two["minutes"] - 2 * one["minutes"]) < 0.11  # of all four epochs
    rate = TINY["lr"] / total_steps(4)
    assert last_rates(folder) == pytest.approx([rate, rate], rel=1e-4)


def test_a_pipe_hears_of_progress_every_quarter_of_a_minute(folder):
    result = folder.run(code=CLOCK.format(seconds=1), text=False, encoding=None)
    output = result.stdout.decode().replace("\r\n", "\n")
    steps = [step for step, _, _ in steps_reported(output)]
    assert len(steps) >= 2 and set(np.diff(steps)) <= {15, 16}
    assert "\r" not in output


# The run log


def test_the_run_log_compares_runs_on_the_same_text(trained_here, tiny, command):
    tiny(lr=2e-2, num_epochs=1)
    output, _ = command()
    one, two = run_log(trained_here)
    assert TINY.items() <= one["settings"].items()
    assert two["settings"] == {**one["settings"], "lr": 2e-2, "num_epochs": 1}
    last = output.splitlines()[-1]
    assert re.search(r"\blr 0\.01\b.*\b0\.02\b", last) and "seed" not in last
    assert f"{one['best_val']:.4f}" in last and f"{two['best_val']:.4f}" in last

    trained_here.write("input.txt", TEXT + TEXT[200:300])
    output, _ = command()
    assert f"{two['best_val']:.4f}" not in output and len(run_log(trained_here)) == 3

    lines = trained_here.read("runs.jsonl")
    damaged = b'[1]\nnull\n{"checksum": 1}\n\xff\n' + lines[:60]  # and no newline at the end
    trained_here.write("runs.jsonl", lines + damaged)
    trained_here.write("input.txt", TEXT)
    tiny(seed=1)
    output, status = command()
    assert status == 0 and "seed 0" in output and f"{two['best_val']:.4f}" in output
    after = trained_here.read("runs.jsonl")
    assert after.startswith(lines) and lines[:60] in after.splitlines()
    assert json.loads(after.splitlines()[-1])["settings"]["seed"] == 1
    assert len(after.splitlines()) == 3 + 5 + 1


def test_ctrl_c_during_the_final_text_leaves_a_line_in_the_run_log(
        trained_here, tiny, command, monkeypatch):
    before = trained_here.files()

    def generate(model, tokens, max_new_tokens, *arguments, real=train.generate):
        if max_new_tokens == TINY["max_new_tokens"]:
            raise KeyboardInterrupt
        return real(model, tokens, max_new_tokens, *arguments)

    monkeypatch.setattr(train, "generate", generate)
    output, status = command()
    assert epochs(output) == [0, 1] and isinstance(status, str)
    assert len(run_log(trained_here)) == 2
    assert trained_here.read("completions.txt") == before["completions.txt"]


# What can be wrong


def test_a_refusal_is_one_line_and_a_status(folder):
    folder.edit(n_heads=3)
    result = folder.run()
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "n_heads = 3" in result.stderr
    assert set(folder.files()) == {"input.txt"}


@pytest.mark.parametrize("name, value", [
    ("n_heads", 3), ("n_emb", 0), ("ctx_len", True), ("dropout", 1.0), ("num_epochs", 0),
    ("batch_size", 0), ("n_layers", 1.5), ("lr", "3e-3"), ("lr", (3e-3,)), ("max_norm", math.nan),
    ("seed", -1), ("beta2", 1), ("top_k", None), ("temperature", -1)])
def test_settings_that_cannot_be_used(here, tiny, command, name, value):
    tiny(**{name: value})
    assert f"{name} = {value!r}" in refused(here, command)


USELESS = {"missing": None, "a folder": "folder", "empty": b"", "short": b"to be or not to be",
           "not UTF-8": b"to be or not" * 99 + b"\xff", "UTF-16": TEXT.encode("utf-16"),
           "UTF-16 without its mark": TEXT.encode("utf-16-le"), "one character": b"a" * 5000}


@pytest.mark.parametrize("content", USELESS.values(), ids=USELESS)
def test_texts_that_cannot_be_used(here, command, content):
    (here.path / "input.txt").unlink()
    if content == "folder":
        (here.path / "input.txt").mkdir()
    elif content is not None:
        here.write("input.txt", content)
    line = refused(here, command)
    assert "input.txt" in line
    assert content is not None or str(here.path.resolve()) in line  # where it was looked for


def test_texts_that_can_be_used(here, command, finished_run):
    """A mark at the beginning, Windows newlines, or no newline at all."""
    here.write("input.txt", b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    output, _ = command()
    if ON_CPU:
        assert losses(output) == losses(finished_run[1].stdout)
    assert not {"\r", "\ufeff"} & set(here.read("completions.txt").decode())
    here.write("input.txt", TEXT.replace("\n", "--Ω床🌙"))
    assert command()[1] == 0
    output, status = command("--sample")
    assert status == 0 and len(output) == TINY["max_new_tokens"] + 1
    assert command("--sample", "Ω床")[0].startswith("Ω床")


@pytest.mark.parametrize("arguments, name", [
    (["--resume"], "checkpoint.safetensors"), (["--sample"], "model.safetensors"),
    (["--look", "7"], "model.safetensors")])
def test_files_that_cannot_be_used(trained_here, tiny, command, arguments, name):
    tiny(num_epochs=3)
    whole = trained_here.read(name)
    other = ({"model.safetensors", "checkpoint.safetensors"} - {name}).pop()
    mx.save_safetensors("foreign.safetensors", {"weight": mx.zeros(3)})
    damaged = set()
    for content in (b"", b"Sonnet 18", whole[: len(whole) // 2], whole[:-1],
                    trained_here.read("foreign.safetensors"), trained_here.read(other)):
        trained_here.write(name, content)
        damaged.add(refused(trained_here, command, *arguments))
    (trained_here.path / name).unlink()
    missing = refused(trained_here, command, *arguments)
    assert missing not in damaged and all(name in line for line in {missing, *damaged})


def test_files_of_another_version_of_the_code(trained_here, tiny, command, monkeypatch):
    @dataclass
    class OtherConfig(train.GPTConfig):
        bias: bool

    class OtherGPT(train.GPT):
        def __init__(self, config):
            super().__init__(config)
            self.new_layer = self.pop("ln_f")

    for name, other in (("GPT", OtherGPT), ("GPTConfig", OtherConfig)):
        with monkeypatch.context() as patched:
            patched.setattr(train, name, other)
            assert "model.safetensors" in refused(trained_here, command, "--sample")
    tiny(num_epochs=3)
    for name, other in (("GPT", OtherGPT), ("make_optimizer", lambda _: optim.SGD(0.1))):
        with monkeypatch.context() as patched:
            patched.setattr(train, name, other)
            assert "checkpoint.safetensors" in refused(trained_here, command, "--resume")


@pytest.mark.parametrize("text, settings", [
    (TEXT, dict(ctx_len=2, batch_size=1)), (TEXT[:140], dict(batch_size=8))],
    ids=["an epoch of 440 steps", "an epoch of a single step"])
def test_a_loss_that_diverges_is_noticed_within_200_steps(
        trained_here, tiny, command, text, settings):
    trained_here.write("input.txt", text)
    tiny(lr=1e30, max_norm=1e30, warmup_steps=0, **settings)
    line = refused(trained_here, command)
    assert re.search(r"\b(nan|inf)\b.*\blr\b", line)
    assert int(re.search(r"\d+", line)[0]) <= 200


# Lets no file grow larger than that, as if the disk were full.
SMALL_FILES = """
import resource, signal, train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
train.main()
"""


@unix
def test_a_full_disk_keeps_the_last_good_files(trained):
    before = trained.files()
    size = len(before["model.safetensors"]) + 1000  # the checkpoint is larger
    trained.edit(num_epochs=3)
    full = trained.run("--resume", code=SMALL_FILES.format(size=size))
    assert full.returncode == 1 and epochs(full.stdout) == []
    assert full.stderr.count("\n") == 1 and "checkpoint.safetensors" in full.stderr
    assert trained.read("checkpoint.safetensors") == before["checkpoint.safetensors"]
    assert not list(trained.path.glob("unfinished-*"))
    assert epochs(trained.run("--resume").stdout) == [2]


def test_a_folder_that_cannot_be_written(here, command):
    here.path.chmod(0o500)
    try:
        if os.access(here.path, os.W_OK):
            pytest.skip("this user may write everywhere")
        assert str(here.path.resolve()) in refused(here, command)
    finally:
        here.path.chmod(0o700)


@pytest.mark.parametrize("error", [NameError, ValueError, RuntimeError])
def test_an_error_of_the_readers_own_keeps_its_traceback(here, command, monkeypatch, error):
    def broken(*_):
        raise error("an idea of mine")

    monkeypatch.setattr(train, "evaluate", broken)
    with pytest.raises(error, match="an idea of mine"):
        command()


# Sampling and looking


def test_sample(trained_here, tiny, command):
    (trained_here.path / "input.txt").unlink()  # it needs nothing but the model
    files = trained_here.files()
    first, status = command("--sample", "7 sheep")
    assert status == 0 and first.startswith("7 sheep") and len(first) == 7 + 40 + 1
    assert command("--sample")[0].endswith(files["completions.txt"].decode() + "\n")
    long = TEXT[100:150]  # more than ctx_len
    assert command("--sample", long)[0].startswith(long)
    tiny(n_emb=32, n_heads=8, ctx_len=5, n_layers=9, dropout=0.5)  # those of the model count
    assert command("--sample", "7 sheep")[0] == first
    tiny(top_k=0)
    assert "top_k = 0" in refused(trained_here, command, "--sample", "7")
    assert trained_here.files() == files


def test_sample_follows_temperature_and_top_k(trained_here, tiny, command):
    tiny(max_new_tokens=11, temperature=0)  # with the prompt, as many as the context is long
    weights = arrays(trained_here, "model.safetensors")
    greedy = "7"
    for _ in range(11):
        logits = reference.forward(weights, encoded(greedy)[None], TINY["n_heads"])
        greedy += VOCAB[logits[0, -1].argmax()]
    assert command("--sample", "7")[0] == greedy + "\n"
    tiny(temperature=0.8, top_k=1)
    assert command("--sample", "7")[0] == greedy + "\n"
    tiny(top_k=40)
    assert command("--sample", "7")[0] != greedy + "\n"


def assert_bars(row, shares):
    """Whether a row of bars shows these numbers from 0 to 1."""
    heights = [" ▁▂▃▄▅▆▇█".index(bar) for bar in row]
    assert len(row) == len(shares)
    assert all(abs(height - 8 * min(share, 1)) < 0.51
               for height, share in zip(heights, shares, strict=True))


def test_look(trained_here, tiny, command):
    tiny(dropout=0.5, n_layers=2, num_epochs=1)
    command()
    weights = arrays(trained_here, "model.safetensors")
    for prompt in ("7", "7 sheep and ", TEXT[100:112]):
        output, status = command("--look", prompt)
        assert status == 0
        first, *lines = output.splitlines()
        assert first.endswith(prompt)
        column = len(first) - len(prompt)
        tokens = encoded(prompt)
        logits, attention = reference.forward_and_attention(weights, tokens[None], n_heads=2)
        p = reference.softmax(logits[0])

        if len(prompt) > 1:
            surprise = -np.log(p[range(len(tokens) - 1), tokens[1:]]) / math.log(len(VOCAB))
            assert lines[0][column] == " "  # nothing predicts the first one
            assert_bars(lines.pop(0)[column + 1 :], surprise)
        for row, head in zip(lines[:4], attention, strict=True):
            assert_bars(row[column:], head[0, -1])
        best = np.argsort(-p[-1])[:8]
        for row, token in zip(lines[4:], best, strict=True):
            assert repr(VOCAB[token]) in row[:column]
            assert re.search(r"\d\.\d\d", row[column:])[0] == f"{p[-1, token]:.2f}"


@pytest.mark.parametrize("arguments, words", [
    (["--look", ""], "12"), (["--look", TEXT[100:113]], "12"), (["--look", "7 π"], "'π'"),
    (["--sample", "7 π"], "'π'")])
def test_prompts_that_cannot_be_used(trained_here, command, arguments, words):
    assert words in refused(trained_here, command, *arguments)


def test_help_and_mistyped_options(here, command):
    output, status = command("--help")
    assert status in (0, None) and all(f"--{n}" in output for n in ("sample", "look", "resume"))
    for arguments in (["--rseume"], ["7"], ["--look"], ["--resume", "--sample"]):
        assert command(*arguments) == ("", 2)


# Output


@unix
@pytest.mark.parametrize("arguments", [[], ["--sample", "7"], ["--look", "7"]])
def test_a_pipe_whose_reader_has_left(trained, arguments):
    reading, writing = os.pipe()
    os.close(reading)
    result = trained.run(*arguments, capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert result.returncode != 0 and result.stderr == ""


def test_control_characters_and_a_pipe_of_few_characters(folder):
    alphabet = "".join(map(chr, range(32, 127)))
    folder.write("input.txt", alphabet + "\x1b\x07a\n" * 300)
    environment = {**folder.command()["env"], "PYTHONIOENCODING": "ascii"}
    result = folder.run(env=environment, encoding="ascii")
    assert result.returncode == 0 and result.stderr == ""
    text = folder.read("completions.txt").decode()
    shown = result.stdout[: result.stdout.index("\n\n")]  # before that text
    assert "\x1b" in text and epochs(shown) == [0, 1]
    assert not {"\x1b", "\x07"} & set(shown)
    look = folder.run("--look", "\x1b\x07a\n", env=environment, encoding="ascii")
    assert look.returncode == 0 and not {"\x1b", "\x07"} & set(look.stdout)


def in_terminal(folder, width, code):
    """What a process shows in a terminal of that width."""
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, width, 0, 0))
    environment = folder.command()["env"]
    environment.pop("COLUMNS", None)  # which would count for more
    process = folder.start(code, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    end = threading.Timer(60, process.kill)
    end.start()
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            part = b""
        if not part:
            break
        shown += part
    end.cancel()
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


@unix
@pytest.mark.parametrize("width", [12, 150])
def test_progress_takes_one_row_of_a_terminal(folder, width):
    rows = [row.split("\r") for row in in_terminal(
        folder, width, CLOCK.format(seconds=30)).split("\r\n")]
    passing = [part for row in rows for part in row[:-1]]
    assert sum(part.startswith("step ") for part in passing) > 5
    assert all(len(part) < width for part in passing)
    assert epochs("\n".join(row[-1] for row in rows)) == [0, 1]
    for row in rows:
        for old, new in itertools.pairwise(row):  # nothing is left of what was there before
            assert old[len(new) :].strip() == "", row
