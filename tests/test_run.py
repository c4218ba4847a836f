"""Whole runs of train.py: what they print, save, and log, and prompts for the model they leave.

What needs a process of its own gets one. All else calls train.main() in this process.
"""

import math
import re
import runpy
import sys

import mlx.core as mx
import numpy as np
import pytest
import train
from helpers import ON_CPU, SOURCE, TEXT, TINY, VOCAB, arrays, assert_same_run, encoded
from helpers import epochs, losses, refused, run_log, softmax
from mlx.utils import tree_flatten


def test_a_run(finished_run):
    folder, result = finished_run
    output, lines = result.stdout, result.stdout.splitlines()
    assert "Traceback" not in result.stderr and "Warning" not in output
    n_parameters = sum(weight.size for weight in arrays(folder).values())
    for name, value in {**TINY, "parameters": n_parameters}.items():
        assert re.search(rf"\b{name}\W+{value}(?![\w.])", output), name
    uniform = math.log(len(VOCAB))
    assert f"{uniform:.4f}" in output and repr("".join(VOCAB)) in output

    untrained = re.search(r"^Untrained \| train = (\S+) \| val = (\S+)", output, re.M)
    assert all(abs(float(loss) - uniform) < 0.1 for loss in untrained.groups())
    vals = [val for _, _, val in losses(output)]
    assert epochs(output) == [0, 1] and uniform - 0.2 > vals[0] > vals[1]
    for val, perplexity in zip(vals, re.findall(r"^Epoch.* (\S+) *$", output, re.M), strict=True):
        assert abs(float(perplexity) / math.exp(val) - 1) < 0.01
    written = [lines[i + 1].strip() for i, line in enumerate(lines) if " | val = " in line]
    assert len(set(written)) == 3 and all(set(text) <= set(TEXT) | {"⏎"} for text in written)

    text = folder.read("completions.txt").decode()
    assert len(text) == TINY["max_new_tokens"] and set(text) <= set(TEXT)
    end = output[output.index(f"\n{text}\n") :]
    assert "model.safetensors" in end and f"{vals[1]:.4f}" in end
    assert set(folder.files()) == {"input.txt", "model.safetensors", "checkpoint.safetensors",
                                   "runs.jsonl", "completions.txt"}
    assert not list(folder.path.glob("unfinished-*"))
    (run,) = run_log(folder)
    assert TINY.items() <= run["settings"].items() and abs(run["best_val"] - vals[1]) < 1e-4
    assert run["settings"]["parameters"] == n_parameters
    assert len(run["history"]) == 2 and run["mlx"] == mx.__version__


def test_each_loss_is_of_the_right_text(folder, command, monkeypatch):
    """Of all validation text, and of as much training text; and only the latter is trained on."""
    measured, trained_on, planned = [], [], []
    evaluate, get_batches, make_optimizer = train.evaluate, train.get_batches, train.make_optimizer

    def measuring(model, tokens):
        measured.append((tokens.tolist(), f"{evaluate(model, tokens):.4f}"))
        return float(measured[-1][1])

    def batches(tokens, ctx_len, batch_size, rng=None):
        for x, y in get_batches(tokens, ctx_len, batch_size, rng):
            if rng is not None:
                trained_on.append((tokens.tolist(), str(x.tolist())))
            yield x, y

    monkeypatch.setattr(train, "evaluate", measuring)
    monkeypatch.setattr(train, "get_batches", batches)
    monkeypatch.setattr(train, "make_optimizer", lambda n: planned.append(n) or make_optimizer(n))
    output, _ = command()
    shown = re.findall(r"\| train = (\S+) \| val = (\S+)", output)
    assert [loss for _, loss in measured] == [loss for pair in shown for loss in pair]
    tokens, boundary = encoded(TEXT).tolist(), len(TEXT) * 9 // 10
    held_out = tokens[boundary:]
    assert [text for text, _ in measured] == [tokens[: len(held_out)], held_out] * 3
    assert all(text == tokens[:boundary] for text, _ in trained_on)
    assert planned == [len(trained_on)]  # the schedule ends with the last step
    n = len(trained_on) // 2
    # Each epoch cuts the text elsewhere.
    assert {x for _, x in trained_on[:n]}.isdisjoint(x for _, x in trained_on[n:])
    assert f"{evaluate(train.load_model()[0], encoded(TEXT[boundary:])):.4f}" == shown[-1][1]


def test_the_seed_changes_first_weights_and_batches(folder, tiny, command, monkeypatch):
    batches, runs, make_step = [], [], train.make_step

    def noting(*arguments):
        step = make_step(*arguments)
        return lambda x, y: batches.append(str(x.tolist())) or step(x, y)

    monkeypatch.setattr(train, "make_step", noting)
    for seed in (0, 1, 0):
        tiny(seed=seed, num_epochs=1)
        runs.append({*re.findall(r"^(?:Untrained|Epoch).*", command()[0], re.M), *batches})
        batches.clear()
    assert (runs[0] == runs[2] or not ON_CPU) and not runs[0] & runs[1]


def test_a_model_is_trained_in_its_size_and_with_dropout(folder, tiny, command):
    weights = []
    for dropout in (0.5, 0.0):
        tiny(num_epochs=1, n_layers=2, dropout=dropout)
        assert command()[1] == 0
        config = train.load_model()[0].config
        assert (config.ctx_len, config.n_emb, config.n_heads, config.n_layers, config.dropout) == (
            12, 16, 2, 2, dropout)
        weights.append(arrays(folder))
    assert not any(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_first_words_at_step_500_and_dropout_after_them(folder, tiny, command, monkeypatch):
    modes, make_step = [], train.make_step

    def noting(model, optimizer):
        step = make_step(model, optimizer)
        return lambda x, y: modes.append(model.blocks[0].mlp.dropout.training) or step(x, y)

    monkeypatch.setattr(train, "make_step", noting)
    folder.write("input.txt", TEXT[:600])
    tiny(ctx_len=1, batch_size=1, n_emb=4, num_epochs=1, max_new_tokens=5)
    lines = command()[0].splitlines()
    assert len(modes) > 500 and all(modes)
    first, second = (i for i, line in enumerate(lines) if " | val = " in line)
    assert second - first == 3  # a line of text under the losses, and the first words


def test_the_best_weights_are_kept(folder, tiny, command, monkeypatch):
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
    saved, last = arrays(folder), tree_flatten(train.load("checkpoint.safetensors")[0]["model"])
    assert saved.keys() == weights[5].keys()
    assert all(np.array_equal(saved[name], weights[5][name]) for name in saved)
    assert all(np.array_equal(array, weights[7][name]) for name, array in last)
    assert run_log(folder)[-1]["best_val"] == 1
    assert command("--sample")[0].strip("\n") == folder.read("completions.txt").decode().strip("\n")


def test_previous_is_the_model_of_the_run_before(trained, tiny, command):
    first = trained.read("model.safetensors")
    tiny(num_epochs=1, seed=1)
    assert command()[1] == 0
    second = trained.read("model.safetensors")
    assert trained.read("previous.safetensors") == first != second
    tiny(num_epochs=2)
    assert epochs(command("--resume")[0]) == [1]
    assert trained.read("previous.safetensors") == first  # the same run went on


NOTEBOOK = """
import sys
sys.argv = ["/somewhere/ipykernel_launcher.py", "-f", "/somewhere/kernel-1.json"]
with open("train.py", encoding="utf-8") as file:
    exec(compile(file.read(), "cells", "exec"), globals())  # in __main__, as a kernel does
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
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert losses(result.stdout) == losses(finished_run[1].stdout) or not ON_CPU
    assert epochs(result.stdout) == [0, 1]
    assert_same_run(folder, finished_run[0])


IMPORT = """
import argparse, contextlib, dataclasses, functools, json, math, os, pathlib, shutil, sys, tempfile
import textwrap, time, zlib
import mlx.core as mx, mlx.nn, mlx.optimizers, mlx.utils, numpy
done = []
mx.new_stream = lambda *_: done.append("a stream")  # which would start a thread
sys.addaudithook(lambda event, arguments: done.append(arguments[0]) if event == "open" else 0)
import train
done = [path for path in done if not str(path).endswith((".py", ".pyc"))]
sys.exit(f"{done} {mx.get_peak_memory()}" if done or mx.get_peak_memory() else 0)
"""


def test_import_does_nothing(folder):
    result = folder.run(code=IMPORT)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert set(folder.files()) == {"input.txt"}


# The run log, settings and tokens of a reader's own


def test_the_run_log_compares_runs_on_the_same_text(trained, tiny, command):
    tiny(lr=2e-2, num_epochs=1)
    output, _ = command()
    one, two = run_log(trained)
    assert two["settings"] == {**one["settings"], "lr": 2e-2, "num_epochs": 1}
    last = output.splitlines()[-1]
    assert re.search(r"\blr 0\.01\b.*\b0\.02\b", last) and "seed" not in last
    assert f"{one['best_val']:.4f}" in last

    trained.write("input.txt", TEXT + TEXT[200:300])
    output, _ = command()
    assert f"{two['best_val']:.4f}" not in output and len(run_log(trained)) == 3

    lines = trained.read("runs.jsonl")
    trained.write("runs.jsonl", lines + b'[1]\nnull\n{"settings": 1}\n\xff\n' + lines[:60])
    trained.write("input.txt", TEXT)
    tiny(seed=1)
    output, status = command()  # the last line of the log has no newline
    assert status == 0 and "seed 0" in output and f"{two['best_val']:.4f}" in output
    assert trained.read("runs.jsonl").startswith(lines)
    assert b'"seed": 1' in trained.read("runs.jsonl")
    command()
    assert "no settings" in command()[0].splitlines()[-1]  # the same run once more


def test_a_setting_of_the_readers_own(folder):
    marked = re.sub(r"^(# %% 1\..*)$", r"\1\nmy_idea = 5\nMINE = 6", SOURCE, count=1, flags=re.M)
    folder.edit(marked, num_epochs=1)
    assert re.search(r"\bmy_idea\W+5\b", folder.run().stdout)
    assert run_log(folder)[0]["settings"]["my_idea"] == 5
    assert "MINE" not in run_log(folder)[0]["settings"]
    folder.edit(marked.replace("my_idea = 5", "my_idea = 7"))
    assert re.search(r"my_idea 5 to 7", folder.run("--resume").stderr)
    folder.edit()
    assert re.search(r"my_idea 5 to None", folder.run("--resume").stderr)


def test_tokens_longer_than_a_character(folder, command, monkeypatch):
    """Pairs of letters, by an edit of section 3 alone."""
    def encode(tokenizer, text):
        tokens = []
        while text:
            piece = text[:2] if text[:2] in tokenizer.token_of else text[0]
            tokens.append(tokenizer.token_of[piece])
            text = text[len(piece) :]
        return tokens

    monkeypatch.setattr(train, "build_vocab", lambda text: sorted({*text, "ee", "go", "th"}))
    monkeypatch.setattr(train.CharTokenizer, "encode", encode)
    output, status = command()
    assert status == 0 and losses(output)[1][2] < math.log(len(VOCAB) + 3)
    assert train.load_model()[1].vocab == sorted({*VOCAB, "ee", "go", "th"})
    output, status = command("--sample", "the sheep")
    assert status == 0 and output.startswith("the sheep") and len(output) >= 9 + 40 + 1
    assert command("--look", "the sheep")[1] == 0


def test_the_name_of_the_model_is_looked_up_when_it_is_needed(folder, command, monkeypatch):
    monkeypatch.setattr(train, "MODEL", "mine.safetensors")
    output, status = command()
    assert status == 0 and "mine.safetensors" in output
    assert "model.safetensors" not in folder.files() and command("--sample")[1] == 0


# Sampling and looking


def test_sample(trained, tiny, command):
    (trained.path / "input.txt").unlink()  # it needs nothing but the model
    files = trained.files()
    first, status = command("--sample", "7 sheep")
    assert status == 0 and first.startswith("7 sheep") and len(first) == 7 + 40 + 1
    assert command("--sample")[0].endswith(files["completions.txt"].decode() + "\n")
    long = TEXT[100:150]  # more than ctx_len
    assert command("--sample", long)[0].startswith(long)
    tiny(n_emb=15, n_heads=8, ctx_len=5, n_layers=9, dropout=0.5)  # those of the model count
    assert command("--sample", "7 sheep")[0] == first
    tiny(seed=1)
    assert command("--sample", "7 sheep")[0] != first
    tiny(top_k=0)
    assert "top_k = 0" in refused(trained, command, "--sample", "7")
    assert trained.files() == files


def test_sample_follows_temperature_and_top_k(trained, tiny, command):
    tiny(max_new_tokens=11, temperature=0)  # with the prompt, as many as the context is long
    model, greedy = train.load_model()[0], "7"
    for _ in range(11):
        logits = model(mx.array(encoded(greedy)[None]))
        greedy += VOCAB[mx.argmax(logits[0, -1]).item()]
    assert command("--sample", "7")[0] == greedy + "\n"
    tiny(temperature=0.8, top_k=1)
    assert command("--sample", "7")[0] == greedy + "\n"
    tiny(top_k=40)
    assert command("--sample", "7")[0] != greedy + "\n"


def assert_bars(row, shares):
    """Whether a row of bars shows these numbers from 0 to 1."""
    heights = np.array([" ▁▂▃▄▅▆▇█".index(bar) for bar in row])
    assert len(row) == len(shares) and np.abs(heights - 8 * np.minimum(shares, 1)).max() < 0.51


def test_look(trained, tiny, command, monkeypatch):
    tiny(dropout=0.5, n_layers=2, num_epochs=1)
    command()
    model, _ = train.load_model()
    for prompt in ("7", "7 sheep and ", TEXT[100:112]):
        with monkeypatch.context() as patched:  # what the model attends to, by another way
            attention, real = [], train.attention_weights
            patched.setattr(train, "attention_weights",
                            lambda q, k, real=real, seen=attention: seen.append(real(q, k)) or
                            seen[-1])
            tokens = encoded(prompt)
            p = softmax(model(mx.array(tokens[None]))[0])
        output, status = command("--look", prompt)
        assert status == 0
        first, surprises, *lines = output.splitlines()
        column = len(first) - len(prompt)
        assert first.endswith(prompt) and surprises[column:][:1].strip() == ""
        if len(prompt) > 1:  # nothing predicts the first one
            surprise = -np.log(p[range(len(tokens) - 1), tokens[1:]]) / math.log(len(VOCAB))
            assert_bars(surprises[column + 1 :], surprise)
        heads = np.array(attention)[:, 0, :, -1].reshape(4, -1)
        for row, head in zip(lines[:4], heads, strict=True):
            assert_bars(row[column:], head)
        for row, token in zip(lines[4:], np.argsort(-p[-1])[:8], strict=True):
            assert repr(VOCAB[token]) in row[:column]
            assert re.search(r"\d\.\d\d", row[column:])[0] == f"{p[-1, token]:.2f}"
    train.look(model, train.CharTokenizer(VOCAB), "7")
    assert isinstance(model.blocks[1].attn.attn_dropout, train.nn.Dropout)  # as it was


def test_percent_run_in_a_notebook_samples(trained, monkeypatch, capsys):
    """As IPython does it: the arguments are those of a shell, and its own modules are there."""
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(sys, "argv", ["train.py", "--sample", "7 sheep"])
    before = trained.files()
    runpy.run_path("train.py", run_name="__main__")
    assert capsys.readouterr().out.startswith("7 sheep") and trained.files() == before
