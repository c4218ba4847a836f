"""Whole runs of train.py: what they print, save, and log, and prompts for the model they leave.

What needs a process of its own gets one. All else calls train.main() in this process.
"""

import math
import re

import mlx.core as mx
import numpy as np
import pytest
import reference
import train
from helpers import ON_CPU, SOURCE, TEXT, TINY, VOCAB, assert_same_run, epochs, losses, refused
from helpers import run_log
from mlx.utils import tree_flatten


def test_a_run(finished_run):
    folder, result = finished_run
    output = result.stdout
    assert "Traceback" not in result.stderr and "Warning" not in output
    n_parameters = sum(weight.size for weight in folder.arrays().values())
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

    text = folder.read("completions.txt").decode()
    assert len(text) == TINY["max_new_tokens"] and set(text) <= set(TEXT)
    end = output[output.index(f"\n{text}\n") :]
    assert "model.safetensors" in end and f"{vals[1]:.4f}" in end
    assert {file.name for file in folder.path.iterdir()} == {
        "train.py", "input.txt", "model.safetensors", "checkpoint.safetensors", "runs.jsonl",
        "completions.txt"}
    (run,) = run_log(folder)
    assert TINY.items() <= run["settings"].items() and abs(run["best_val"] - vals[1]) < 1e-4
    assert run["settings"]["parameters"] == n_parameters
    assert len(run["history"]) == 2 and run["mlx"] == mx.__version__


def test_each_loss_is_of_the_right_text(folder, command, watch, steps):
    """Of all validation text, and of as much training text; and only the latter is trained on."""
    measured, planned = watch(train, "evaluate"), watch(train, "make_optimizer")
    output, _ = command()
    shown = [loss for pair in re.findall(r"train = (\S+) \| val = (\S+)", output) for loss in pair]
    assert [f"{loss:.4f}" for _, _, loss in measured] == shown
    boundary = len(TEXT) * 9 // 10
    texts = ["".join(VOCAB[token] for token in tokens) for _, tokens, _ in measured]
    assert texts == [TEXT[: len(TEXT) - boundary], TEXT[boundary:]] * 3
    assert f"{train.evaluate(train.load_model(train.MODEL)[0], measured[-1][1]):.4f}" == shown[-1]

    n = len(steps.rows)
    assert planned[0][0] == n  # the schedule ends with the last step
    assert n == 2 * train.count_batches(range(boundary), 12, 8)
    first, second = ({"".join(VOCAB[token] for token in row) for batch in batches for row in batch}
                     for batches in (steps.rows[: n // 2], steps.rows[n // 2 :]))
    assert all(row in TEXT[:boundary] for row in first | second)
    assert len(first & second) < len(first) / 2  # each epoch cuts the text elsewhere


def test_what_the_seed_and_dropout_change(folder, tiny, command, steps):
    untrained, rows, weights = [], [], []
    for seed, dropout in ((0, 0.0), (1, 0.0), (0, 0.5)):
        tiny(seed=seed, dropout=dropout, num_epochs=1, n_layers=2)
        untrained += re.findall(r"^Untrained.*", command()[0], re.M)
        rows.append(str(steps.rows))
        steps.rows.clear()
        weights.append(folder.arrays())
        config = vars(train.load_model(train.MODEL)[0].config)
        wanted = dict(vocab_size=len(VOCAB), ctx_len=12, n_emb=16, n_heads=2, n_layers=2)
        assert config.items() >= {**wanted, "dropout": dropout}.items()
    assert (untrained[0] == untrained[2] or not ON_CPU) and rows[0] == rows[2]
    assert untrained[0] != untrained[1] and rows[0] != rows[1]
    assert not any(np.array_equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_first_words_at_step_500_and_dropout_after_them(folder, tiny, command, monkeypatch):
    dropout = []

    def make_step(model, optimizer):
        def step(x, y):  # which does not train, to save time
            dropout.append(model.blocks[0].mlp.dropout.training)
            return mx.array(1.0)

        return step

    monkeypatch.setattr(train, "make_step", make_step)
    folder.write("input.txt", TEXT[:600])
    tiny(ctx_len=1, batch_size=1, n_emb=4, num_epochs=1, max_new_tokens=5)
    lines = command()[0].splitlines()
    assert len(dropout) > 500 and all(dropout)
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
    saved, last = folder.arrays(), tree_flatten(train.load("checkpoint.safetensors")[0]["model"])
    assert saved.keys() == weights[5].keys()
    assert all(np.array_equal(saved[name], weights[5][name]) for name in saved)
    assert all(np.array_equal(array, weights[7][name]) for name, array in last)
    assert run_log(folder)[-1]["best_val"] == 1
    assert command("--sample")[0].strip("\n") == folder.read("completions.txt").decode().strip("\n")


def test_previous_is_the_model_of_the_run_before(trained, tiny, command, monkeypatch):
    first = trained.read("model.safetensors")
    tiny(num_epochs=1, seed=1)
    command()
    second = trained.read("model.safetensors")
    assert trained.read("previous.safetensors") == first != second
    tiny(num_epochs=2)
    assert epochs(command("--resume")[0]) == [1]
    assert trained.read("previous.safetensors") == first  # the same run went on

    monkeypatch.setattr(train, "MODEL", "mine.safetensors")
    (trained.path / "model.safetensors").unlink()
    output, status = command()
    assert status == 0 and "mine.safetensors" in output and command("--sample")[1] == 0


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
import sys
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
    last = command()[0].splitlines()[-1]
    one, two = run_log(trained)
    assert two["settings"] == {**one["settings"], "lr": 2e-2, "num_epochs": 1}
    assert re.search(r"\blr 0\.01\b.*\b0\.02\b", last) and "seed" not in last
    assert f"{one['best_val']:.4f}" in last

    trained.write("input.txt", TEXT + TEXT[200:300])
    assert f"{two['best_val']:.4f}" not in command()[0] and len(run_log(trained)) == 3

    lines = trained.read("runs.jsonl")
    trained.write("runs.jsonl", lines + b'[1]\nnull\n{"settings": 1}\n\xff\n')
    trained.write("input.txt", TEXT)
    assert f"{two['best_val']:.4f}" in command()[0]
    assert trained.read("runs.jsonl").startswith(lines)
    assert "no settings" in command()[0].splitlines()[-1]  # the same run once more


def test_a_setting_of_the_readers_own(folder):
    marked = re.sub(r"^(# %% 1\..*)$", r"\1\nmy_idea = 5\nMINE = 6", SOURCE, count=1, flags=re.M)
    folder.edit(marked, num_epochs=1)
    assert re.search(r"\bmy_idea\W+5\b", folder.run().stdout)
    assert run_log(folder)[0]["settings"]["my_idea"] == 5
    assert "MINE" not in run_log(folder)[0]["settings"]
    folder.edit(marked.replace("my_idea = 5", "my_idea = 7"))
    assert "my_idea 5 to 7" in folder.run("--resume").stderr
    folder.edit()
    assert "my_idea 5 to None" in folder.run("--resume").stderr


def test_tokens_longer_than_a_character(folder, command, monkeypatch):
    """Pairs of letters, by an edit of section 3 alone."""
    def encode(tokenizer, text):
        return [tokenizer.token_of[piece] for piece in re.findall("ee|go|th|(?s:.)", text)]

    monkeypatch.setattr(train, "build_vocab", lambda text: sorted({*text, "ee", "go", "th"}))
    monkeypatch.setattr(train.CharTokenizer, "encode", encode)
    output, status = command()
    assert status == 0 and losses(output)[1][2] < math.log(len(VOCAB) + 3)
    output, status = command("--sample", "the sheep")
    assert status == 0 and output.startswith("the sheep") and len(output) >= 9 + 40 + 1
    assert command("--look", "the sheep")[1] == 0


# Sampling and looking


def test_sample(trained, tiny, command, watch):
    (trained.path / "input.txt").unlink()  # it needs nothing but the model
    files = trained.files()
    first, status = command("--sample", "7 sheep")
    assert status == 0 and first.startswith("7 sheep") and len(first) == 7 + 40 + 1
    assert command("--sample")[0].endswith(files["completions.txt"].decode() + "\n")
    long = TEXT[100:150]  # more than ctx_len
    assert command("--sample", long)[0].startswith(long)
    tiny(n_emb=15, n_heads=8, ctx_len=5, n_layers=9, dropout=0.5)  # those of the model count
    assert command("--sample", "7 sheep")[0] == first
    generated = watch(train, "generate")
    tiny(seed=1, max_new_tokens=11, temperature=0.7, top_k=9)
    assert not first.startswith(command("--sample", "7 sheep")[0].strip("\n"))
    assert generated[0][2:5] == (11, 0.7, 9)
    tiny(top_k=0)
    assert "top_k = 0" in refused(trained, command, "--sample", "7")
    tiny(top_k=None)  # all tokens
    assert command("--sample", "7")[1] == 0
    assert trained.files() == files


def assert_bars(row, shares):
    """Whether a row of bars shows these numbers from 0 to 1."""
    heights = np.array([" ▁▂▃▄▅▆▇█".index(bar) for bar in row])
    assert len(row) == len(shares) and np.abs(heights - 8 * np.minimum(shares, 1)).max() < 0.51


@pytest.mark.parametrize("prompt", ["7 sheep and ", TEXT[100:112]])
def test_look(folder, tiny, command, watch, prompt):
    tiny(dropout=0.5, n_layers=2, num_epochs=1)
    command()
    model, tokenizer = train.load_model(train.MODEL)
    attention, tokens = watch(train, "attention_weights"), np.array(tokenizer.encode(prompt))
    p = reference.softmax(np.array(model(mx.array(tokens[None]))[0]))
    heads = np.concatenate([weights[0, :, -1] for _, _, weights in attention])

    first, surprises, *lines = command("--look", prompt)[0].splitlines()
    column = len(first) - len(prompt)
    assert first.endswith(prompt) and surprises[column] == " "
    surprise = -np.log(p[range(len(tokens) - 1), tokens[1:]]) / math.log(len(VOCAB))
    assert_bars(surprises[column + 1 :], surprise)  # nothing predicts the first character
    for row, head in zip(lines[:4], heads, strict=True):
        assert_bars(row[column:], head)
    for row, token in zip(lines[4:], np.argsort(-p[-1])[:8], strict=True):
        assert repr(VOCAB[token]) in row[:column]
        assert re.search(r"\d\.\d\d", row[column:])[0] == f"{p[-1, token]:.2f}"
    train.look(model, tokenizer, "7")
    assert isinstance(model.blocks[1].attn.attn_dropout, train.nn.Dropout)  # as it was
