"""Sections 11 and 12 as a user meets them: whole runs of an edited copy in a folder of its own."""

import ast
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import train
from conftest import EXACT, ROOT, TEXT, TINY, unix
from mlx.utils import tree_flatten
from test_model import count, numpy_gpt, numpy_loss
from test_training import of_text, same

EPOCH = re.compile(r"^Epoch (\d+) \| train = (\d\.\d{4}) \| val = (\d\.\d{4}) \| "
                   r"as unsure as between \d+\.\d letters$", re.M)
BLOCKS = " ▁▂▃▄▅▆▇█"
STEPS = (len(TEXT) * 9 // 10 // 12 - 1) // 4  # in an epoch of a run in tiny settings
STOPPED = r"train\.py: stopped\. Epochs of this run in model\.safetensors: (\d+)(.*?)"


def epochs(result):
    assert result.returncode == 0, result.stderr
    return EPOCH.findall(result.stdout)


def written_lines(result):
    """The line of text under each epoch's line."""
    lines = result.stdout.splitlines()
    return [below[10:] for line, below in zip(lines, lines[1:]) if EPOCH.match(line)]


def complaint(folder, *arguments, **options):
    """Runs the script, which must refuse in one line and change no file; returns the line."""
    before = folder.files()
    result = folder.run(*arguments, **options)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("train.py: ")
    assert "Traceback" not in result.stderr and "Epoch" not in result.stdout
    assert folder.files() == before
    return result.stderr


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """The folder in which this very process is, for what needs no process of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text(TEXT)
    yield tmp_path
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_import_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train"
    result = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, text=True,
                            capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []  # and no input.txt was needed


def test_windows_has_all_that_is_imported_and_used():
    unix_only = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
    for path in (ROOT / "train.py", *ROOT.glob("tests/*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in getattr(node, "names", [])]
            assert not unix_only & {*names, getattr(node, "module", None)}, path
    used = set(re.findall(r"\b(?:os|signal)\.\w+", (ROOT / "train.py").read_text(encoding="utf-8")))
    assert "signal.SIGINT" in used
    assert not used & {"signal.SIGPIPE", "signal.SIGKILL", "signal.SIGALRM", "signal.SIGHUP",
                       "signal.pthread_sigmask", "os.fork", "os.killpg", "os.setsid", "os.getuid",
                       "os.geteuid", "os.uname", "os.mkfifo", "os.getpgid", "os.sched_getaffinity"}


def test_whole_run_compiled(compiled_run, compiled):
    """The only whole run here with mx.compile: as a user runs it."""
    folder, process = compiled_run, compiled_run.started[0]
    output, error = process.communicate()
    lines = epochs(subprocess.CompletedProcess(process.args, process.returncode, output, error))
    assert [int(epoch) for epoch, _, _ in lines] == [0, 1]
    assert float(lines[-1][2]) < float(lines[0][2]) < math.log(len(set(TEXT))) + 0.1
    written = (folder.path / "completions.txt").read_text(encoding="utf-8")
    assert len(written) == 40 and set(written) <= set(TEXT) and len(set(written)) > 5
    alone = of_text()[:4]  # without a line of text after each epoch
    assert np.allclose(np.array(lines, float)[:, 1:].ravel(), alone, atol=1e-4 if EXACT else 2e-3)


# What is seen while it runs


def test_what_a_run_says(first_run):
    folder, result = first_run
    vocab = len(set(TEXT))
    lines = result.stdout.splitlines()
    assert result.stderr == ""
    assert lines[:2] == [
        f"The small model: ctx_len 12, n_emb 16, n_heads 2, n_layers 1, "
        f"{count(vocab, 12, 16, 1):,} parameters",
        f"The text: {len(TEXT):,} characters of {vocab} kinds. "
        f"Blind guessing costs ln {vocab} = {math.log(vocab):.4f}"]
    losses = re.match(r"Untrained \| train = (\d\.\d{4}) \| val = (\d\.\d{4}) \| as ", lines[2])
    assert all(abs(float(loss) - math.log(vocab)) < 0.1 for loss in losses.groups())
    assert lines[3].startswith(" " * 10) and len(lines[3]) == 10 + 70
    assert set(lines[3][10:]) <= set(TEXT) | {"⏎"} and len(set(lines[3])) > 20  # random letters
    assert "ompiling" in lines[4]
    for epoch, at in ((0, 5), (1, 8)):
        assert re.fullmatch(rf"step {(epoch + 1) * STEPS} of {2 * STEPS}, loss \d\.\d\d, "
                            r"[\d,]+ characters/s, validating", lines[at])
        assert (found := EPOCH.match(lines[at + 1])) and int(found[1]) == epoch
        unsure = re.search(r"as .*?(\d+\.\d) letters", lines[at + 1])[1]
        assert abs(float(unsure) - math.exp(float(found[3]))) < 0.06
        assert lines[at + 2].startswith(" " * 10) and len(lines[at + 2]) == 10 + 70
    text = folder.read("completions.txt").decode()
    end = result.stdout[-len(text) - 300 :]
    for words in ("model.safetensors", "best weights", "completions.txt",
                  "python train.py --sample", "--look"):
        assert words in end
    assert result.stdout.endswith("\n" + text + "\n")
    assert "\r" not in result.stdout and "\x1b" not in result.stdout


@pytest.mark.parametrize("small, words", [(True, "The small model: "), (False, "The model: ")])
def test_the_first_line_says_which_model_it_is(here, tiny, capsys, monkeypatch, small, words):
    tiny(small=small)
    monkeypatch.setattr(train, "train", lambda *_: iter([(0, math.nan, 1.0)]))
    with pytest.raises(train.Refusal):
        train.train_and_write(resuming=False)
    assert capsys.readouterr().out.startswith(words)


def test_the_run_is_train_and_evaluate_and_nothing_else(first_run, tiny):
    """The lines of text that it writes, for example, have not changed its losses."""
    folder, result = first_run
    history = notes_of(folder)["history"]
    assert same(sum(history, []), of_text()[: 2 * len(history)])
    assert epochs(result) == [(str(i), f"{t:.4f}", f"{v:.4f}") for i, (t, v) in enumerate(history)]


def test_the_losses_are_those_of_the_saved_weights(first_run):
    folder, _ = first_run
    saved, notes = arrays(folder.read("model.safetensors")), notes_of(folder)
    last = [(name[5:], w) for name, w in saved.items() if name.startswith("last.")]
    best = [(name, w) for name, w in saved.items() if not name.startswith(("last.", "optimizer."))]
    tokens = np.array([notes["vocab"].index(c) for c in TEXT])
    boundary = len(tokens) * 9 // 10
    val = tokens[boundary:]
    seen = tokens[: len(val) // 2 + 12]  # measured alike: without dropout, at the end
    losses = [numpy_loss(last, part, 12, 2) for part in (seen, val)]
    assert np.allclose(notes["history"][-1], losses, atol=1e-4)
    lowest = min(val for _, val in notes["history"])
    assert abs(numpy_loss(best, val, 12, 2) - lowest) < 1e-4


def test_each_line_of_text_begins_alike_and_is_by_the_weights_of_its_epoch(first_run):
    folder, result = first_run
    before, *lines = [line[10:] for line in result.stdout.splitlines() if line.startswith(" " * 10)]
    assert len(lines) == 2 and lines == written_lines(result) and len({before, *lines}) == 3
    text = folder.read("completions.txt").decode()  # by the best weights, here the last
    assert lines[-1].startswith(text.replace("\n", "⏎"))


@pytest.mark.skipif(not EXACT, reason="a claim for processors")
def test_same_seed_same_losses_and_text(first_run, folder):
    assert epochs(folder.run()) == epochs(first_run[1])
    assert folder.files().keys() == first_run[0].files().keys()
    assert folder.read("completions.txt") == first_run[0].read("completions.txt")
    equal_files(folder, first_run[0])
    folder.edit(seed=1)
    assert epochs(folder.run()) != epochs(first_run[1])
    assert folder.read("completions.txt") != first_run[0].read("completions.txt")


def test_completions_begin_on_a_new_line(folder):
    folder.edit(num_epochs=1)
    folder.write("input.txt", TEXT.replace(";", "\t"))  # a tab sorts before it
    folder.run()
    completions = folder.read("completions.txt").decode()
    assert folder.run("--sample", "\n").stdout == "\n" + completions + "\n"
    assert folder.run("--sample").stdout == completions + "\n"


def test_text_without_newlines_and_prompts_with_a_dash(folder):
    folder.edit(num_epochs=1)
    folder.write("input.txt", "--1-2--3" * 200)
    assert len(epochs(folder.run())) == 1
    alone = folder.run("--sample")
    assert alone.returncode == 0 and len(alone.stdout) == 40 + 1
    assert folder.run("--sample", "-1").stdout.startswith("-1")
    assert folder.run("--look", "--2").stdout.split("\n")[0].strip() == "--2"


@pytest.mark.skipif(not EXACT, reason="for processors only")
@pytest.mark.parametrize("batch_size, streams", [(4, 2), (5, 1)])
def test_an_even_batch_is_shared_by_two_cores(here, tiny, monkeypatch, batch_size, streams):
    tiny(batch_size=batch_size)
    found = []

    def noting(model, optimizer, train_tokens, val_tokens, done, loss_fn, watch):
        monkeypatch.setattr(train, "loss_fn", lambda model, x, y: found.append(len(x)) or 0)
        loss_fn(model, mx.zeros((batch_size, 12)), mx.zeros((batch_size, 12)))
        yield 0, math.nan, math.nan

    monkeypatch.setattr(train, "train", noting)
    with pytest.raises(train.Refusal):
        train.train_and_write(resuming=False)
    assert found == [batch_size // streams] * streams


def test_curves_of_block_characters(capsys):
    train.draw_curves([[2.5, 3.0], [1.75, 2.0], [1.25, 1.0]])
    train.draw_curves([[1.5, 1.5]])
    assert capsys.readouterr().out == ("train 2.5000 ▆▄▂ 1.2500\n"  # on one scale, from 1 to 3
                                       "  val 3.0000 █▅▁ 1.0000\n"
                                       "train 1.5000 ▁ 1.5000\n  val 1.5000 ▁ 1.5000\n")


def test_curves_close_a_run(first_run):
    (_, t0, v0), (_, t1, v1) = epochs(first_run[1])
    low, high = min(map(float, (t0, v0, t1, v1))), max(map(float, (t0, v0, t1, v1)))
    rows = ["".join("▁▂▃▄▅▆▇█"[round(7 * (float(v) - low) / (high - low))] for v in row)
            for row in ((t0, t1), (v0, v1))]
    assert f"train {t0} {rows[0]} {t1}\n  val {v0} {rows[1]} {v1}\n" in first_run[1].stdout


def watching(*arguments):
    """What train() calls with each loss."""
    watch = train.watch_steps(*arguments)
    next(watch)
    return watch.send


@pytest.mark.parametrize("terminal, pause", [(False, 30), (True, 1)])
@pytest.mark.parametrize("resumed_at", [0, 100])
def test_no_long_silence(tiny, capsys, monkeypatch, terminal, pause, resumed_at):
    tiny(num_epochs=3)
    now = [1000.0]
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    watch = watching(resumed_at, 100)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # it would reach the compiler
    watch(mx.array(2.5))
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    capsys.readouterr()
    spoken = now[0]
    for done in range(resumed_at + 2, 301):
        now[0] += 0.75
        watch(mx.array(2.5))
        line = capsys.readouterr().out
        if line:
            assert f"step {done} of 300, loss 2.50, " in line
            assert f", {4 * 12 / 0.75:,.0f} characters/s, " in line
            left = f"{0.75 * (300 - done) / 60:.1f} min left"
            then = "validating" if done % 100 == 0 else left
            assert line.rstrip().endswith(f", {then}")
            assert len(line.strip()) < 80  # or a terminal would break it
            assert line.startswith("\r\x1b[K") == terminal and line.endswith("\n") != terminal
            assert now[0] - spoken > pause or done % 100 == 0
            spoken = now[0]
        assert now[0] - spoken <= pause + 0.75


@pytest.mark.parametrize("good", [1, 250])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_noticed_soon(tiny, capsys, good, bad):
    watch = watching(0, 10_000)
    for _ in range(good):
        watch(mx.array(2.0))
    with pytest.raises(train.Refusal, match=f"loss is {bad} in step ") as end:
        for _ in range(200):
            watch(mx.array(bad))
    for name in ("lr", "weight_decay", "beta1", "beta2"):
        assert name in str(end.value)


def in_terminal(folder, *arguments, keys=b"", after=b"\0"):
    """Runs the script in a terminal, in which some output is answered by keys; what it shows."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    process = folder.start(*arguments, text=False, encoding=None, stdin=theirs, stdout=theirs,
                           stderr=theirs, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(theirs)
    sent, typed, end = b"", time.monotonic(), threading.Timer(60, process.kill)
    end.start()
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            part = b""
        if not part:
            os.close(ours)
            end.cancel()
            return sent.decode(), process.wait()
        sent += part
        if after in sent and time.monotonic() > typed:
            os.write(ours, keys)
            typed = time.monotonic() + 2  # once more, if that gets lost: see interrupted()


@unix
def test_progress_line_in_a_terminal(folder):
    screen, status = in_terminal(folder)
    assert status == 0
    assert re.search(r"\r\x1b\[Kstep \d+ of \d+, loss .*, validating"
                     r"\r\x1b\[KEpoch 0 \| train = ", screen)  # the epoch's line takes its place
    assert "ompiling" in screen and not re.search(r"(ompiling|step \d+ of)[^\r]*\r?\n", screen)


@unix
def test_ctrl_c_in_a_terminal(folder):
    folder.edit(num_epochs=10_000)
    screen, status = in_terminal(folder, keys=b"\x03", after=b"Epoch 0 ")
    assert status == 130 and "Traceback" not in screen
    assert re.search(rf"(\n|\r\x1b\[K){STOPPED}\r?\n$", screen)  # a line of its own


# Saving and sampling


def read_safetensors(data):
    """The header of a safetensors file, read by its specification, without MLX."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert 8 + length + max(a["data_offsets"][1] for a in header.values()) == len(data)
    return header, metadata


def arrays(data):
    """The arrays of a safetensors file, read by its specification, without MLX."""
    header, _ = read_safetensors(data)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    kinds = {"F32": np.float32, "U64": np.uint64}
    read = {}
    for name, a in header.items():
        begin, end = (start + offset for offset in a["data_offsets"])
        read[name] = np.frombuffer(data[begin:end], kinds[a["dtype"]]).reshape(a["shape"])
    return read


def notes_of(folder, name="model.safetensors"):
    """What the file of a run says about it."""
    return json.loads(read_safetensors(folder.read(name))[1]["notes"])


def equal_files(folder, other):
    """Asserts that two folders hold the same run, on a CPU to the last bit."""
    mine, theirs = (arrays(one.read("model.safetensors")) for one in (folder, other))
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert np.array_equal(mine[name], theirs[name]) if EXACT else np.allclose(
            mine[name], theirs[name], atol=2e-2), name
    if EXACT:
        assert notes_of(folder) == notes_of(other)


def test_the_file_of_a_run(first_run, tiny):
    folder, result = first_run
    assert set(folder.files()) == {"input.txt", "completions.txt", "model.safetensors"}
    header, metadata = read_safetensors(folder.read("model.safetensors"))
    assert header["wte.weight"] == {**header["last.wte.weight"],
                                    "data_offsets": header["wte.weight"]["data_offsets"]}
    assert header["wte.weight"]["shape"] == [len(set(TEXT)), 16]
    assert header["blocks.0.mha.q_proj.weight"]["dtype"] == "F32"
    kept = [name for name in header if name.startswith("optimizer.")]
    last = [name.removeprefix("last.") for name in header if name.startswith("last.")]
    best = [name for name in header if not name.startswith(("last.", "optimizer."))]
    names = [name for name, _ in tree_flatten(train.GPT(3).parameters())]
    assert sorted(best) == sorted(last) == sorted(names)  # under their own names, for any reader
    assert any(name.endswith("wte.weight.m") for name in kept)
    assert any(name.endswith("wte.weight.v") for name in kept)
    notes = notes_of(folder)
    settings = {name: value for name, value in TINY.items() if name != "small"}
    assert notes == {**settings, "vocab": "".join(sorted(set(TEXT))), "history": notes["history"],
                     "input.txt": hashlib.sha256(TEXT.encode()).hexdigest()[:16]}
    assert metadata.keys() == {"notes", "sha256"}
    assert metadata["sha256"] == sha256_of(arrays(folder.read("model.safetensors")), notes)
    assert [[f"{x:.4f}" for x in pair] for pair in notes["history"]] == [
        [t, v] for _, t, v in epochs(result)]


def test_best_and_last_weights(folder):
    text = "ab" * 450 + "ba" * 10 + "aabb" * 20  # the better learnt, the worse it goes at the end
    folder.write("input.txt", text)
    folder.edit(num_epochs=4, temperature=2.0)
    result = folder.run()
    vals = [float(val) for _, _, val in epochs(result)]
    assert min(vals) < vals[-1] - 1e-2
    saved = arrays(folder.read("model.safetensors"))
    val = np.array(["ab".index(c) for c in text[len(text) * 9 // 10 :]])
    best = [(n, w) for n, w in saved.items() if not n.startswith(("last.", "optimizer."))]
    last = [(n[5:], w) for n, w in saved.items() if n.startswith("last.")]
    assert abs(numpy_loss(best, val, 12, 2) - min(vals)) < 1e-3
    assert abs(numpy_loss(last, val, 12, 2) - vals[-1]) < 1e-3
    written = folder.read("completions.txt").decode()
    assert folder.run("--sample").stdout == written + "\n"  # both by the best weights
    lines = written_lines(result)  # each by those of its epoch
    assert lines[vals.index(min(vals))].startswith(written) and not lines[-1].startswith(written)


def test_sample_continues_a_prompt(trained):
    files = trained.files()
    (trained.path / "input.txt").unlink()
    first = trained.run("--sample", "7 sheep")
    assert first.returncode == 0 and first.stderr == ""
    assert first.stdout.startswith("7 sheep") and len(first.stdout) == 7 + 40 + 1
    assert trained.run("--sample", "7 sheep").stdout == first.stdout
    assert trained.run("--sample").stdout == files["completions.txt"].decode() + "\n"
    assert trained.run("--sample", "").stdout == files["completions.txt"].decode() + "\n"
    longer = trained.run("--sample", TEXT[:50]).stdout  # than ctx_len
    assert longer.startswith(TEXT[:50]) and len(longer) == 50 + 40 + 1
    assert {**trained.files(), "input.txt": files["input.txt"]} == files  # nothing was written


def test_sample_is_by_the_constants_in_the_file(trained):
    before = trained.run("--sample", "7").stdout
    trained.edit(n_emb=30, n_heads=7, ctx_len=5, n_layers=9, dropout=0.5, batch_size=9, lr=1)
    assert trained.run("--sample", "7").stdout == before
    trained.edit(max_new_tokens=25, temperature=0, n_emb=8)
    greedy = trained.run("--sample", "7").stdout
    assert len(greedy) == 1 + 25 + 1 and greedy[:-1] != before[:26]
    trained.edit(seed=5)
    assert trained.run("--sample", "7").stdout != before


@pytest.mark.parametrize("arguments", [["--sample"], ["--look", "7"]])
def test_settings_are_checked_before_a_model_writes(trained, arguments):
    trained.edit(temperature="hot")
    assert "temperature = 'hot' must be" in complaint(trained, *arguments)


def test_text_of_another_world(folder):
    text = "🌙 床前明月光,疑是地上霜。\r\n举头望明月,低头思故乡。 🌕\r\n" * 30
    folder.write("input.txt", b"\xef\xbb\xbf" + text.encode())
    folder.edit(num_epochs=1)
    assert len(epochs(folder.run())) == 1
    written = folder.read("completions.txt").decode()
    assert len(written) == 40 and set(written) <= set(text) - {"\r"}
    assert folder.run("--sample", "床前").stdout.startswith("床前")
    assert folder.run("--look", "床前").stdout.split("\n")[0].strip() == "床前"
    ascii_terminal = {**folder.command()["env"], "PYTHONIOENCODING": "ascii"}
    assert folder.run("--sample", "床", env=ascii_terminal).returncode == 0


def test_look_inside(here, tiny, first_run, capsys):
    saved, metadata = mx.load(str(first_run[0].path / "model.safetensors"), return_metadata=True)
    tiny(n_layers=2, dropout=0.5)  # which is off while one looks
    mx.random.seed(0)
    for name, weight in tree_flatten(train.GPT(len(set(TEXT))).parameters()):
        noise = 0.5 * mx.random.normal(weight.shape)  # so that there is something to see
        saved[name] = saved[f"last.{name}"] = weight + noise
    write_run(saved, {**json.loads(metadata["notes"]), "n_layers": 2})
    prompt, vocab = "\n7 sheep an", "".join(sorted(set(TEXT)))
    train.look(*train.load_model(prompt))
    first, *lines = capsys.readouterr().out.splitlines()

    weights = [(n, w) for n, w in saved.items() if not n.startswith(("last.", "optimizer."))]
    heads = []
    logits = numpy_gpt(weights, np.array([vocab.index(c) for c in prompt]), 2, looks=heads)[-1]
    assert first.endswith(prompt.replace("\n", "⏎"))
    column = len(first) - len(prompt)
    assert len(heads) == 4  # of two blocks
    for i, head in enumerate(heads):
        words, row = lines[i][:column], lines[i][column:]
        assert [int(n) for n in re.findall(r"\d+", words)] == [i // 2, i % 2]
        levels = np.array([BLOCKS.index(block) for block in row])
        assert levels.shape == head.shape and np.abs(levels - 8 * head).max() < 0.501
    assert len({lines[i][column:] for i in range(4)}) == 4

    p = np.exp(logits) / np.exp(logits).sum()
    for token, line in zip(np.argsort(-p)[:8], lines[4:12], strict=True):
        char, share, bar = re.fullmatch(r"next +('.+') (\d\.\d\d) (█*)", line).groups()
        assert char == repr(vocab[token]) and line.index(share) == column
        assert abs(float(share) - p[token]) < 0.00501 and abs(len(bar) - 50 * p[token]) < 0.501

    table = dict(weights)["wte.weight"]
    table = np.array(table, dtype=np.float64)
    table = table - table.mean(axis=0)
    table = table / np.sqrt((table**2).sum(axis=1, keepdims=True))
    alike = [re.findall(r"'.*?'", line) for line in lines[12:]]
    assert len(alike) == len(set(prompt)) and all("alike" in line for line in lines[12:])
    assert {row[0] for row in alike} == set(map(repr, prompt))  # nothing is more alike than itself
    for row in alike:
        token = list(map(repr, vocab)).index(row[0])
        nearest = [repr(vocab[i]) for i in np.argsort(-(table @ table[token]))]
        assert row == nearest[: len(row)] and len(row) > 3


@pytest.mark.parametrize("arguments, words", [
    (("--look", TEXT[:13]), ["1 to 12 "]), (("--look", ""), ["1 to 12 "]),
    (("--look", "7 sheep!"), ["'!'", "".join(sorted(set(TEXT)))[1:]]),
    (("--sample", "7 sheep!"), ["'!'", "".join(sorted(set(TEXT)))[1:]]),
    (("--sample", "π"), ["'π'", "".join(sorted(set(TEXT)))[1:]])])
def test_prompts_that_do_not_fit(trained, arguments, words):
    line = complaint(trained, *arguments)
    assert all(word in line for word in words)


# Going on


AFTER_AN_EPOCH = """
import os, signal
real, rank = train.say, train.mx.distributed.init().rank()
def say(line, passing=False):
    real(line, passing)
    if line.startswith("Epoch {n} ") and rank == 0:
        os.kill(os.getpid(), signal.{signal})
train.say = say
"""


@unix
def test_resumed_run_equals_one_without_a_break(folder, tmp_path_factory):
    folder.edit(num_epochs=3, dropout=0.2)
    whole = folder.run()
    other = type(folder)(tmp_path_factory.mktemp("other"), num_epochs=3, dropout=0.2)
    stopped = other.run(before=AFTER_AN_EPOCH.format(n=0, signal="SIGKILL"))
    assert stopped.returncode == -signal.SIGKILL
    rest = other.run("--resume")
    assert [int(epoch) for epoch, _, _ in epochs(rest)] == [1, 2]
    for result in (whole, rest):
        assert result.stdout.count(f"\nstep {3 * STEPS} of {3 * STEPS}, ") == 1
    if EXACT:
        assert epochs(rest) == epochs(whole)[1:]
        assert written_lines(rest) == written_lines(whole)[1:]
        assert other.read("completions.txt") == folder.read("completions.txt")
    equal_files(other, folder)  # weights, optimizer, losses and all
    assert set(other.files()) == set(folder.files())


def read_until(process, words):
    """Reads what a process prints up to the line with these words, which must come."""
    assert any(words in line for line in process.stdout)


def saved_epoch(folder):
    """The number of the last epoch in the file."""
    return len(notes_of(folder)["history"]) - 1


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("moment", [0.0, 0.3, 0.7])
def test_killed_at_any_moment_leaves_a_whole_file(folder, moment):
    folder.edit(num_epochs=10_000, n_emb=32, max_new_tokens=5)
    process = folder.start()
    wait_for((folder.path / "model.safetensors").exists)
    time.sleep(moment)
    process.kill()
    process.communicate()
    assert all(np.isfinite(a).all() for a in arrays(folder.read("model.safetensors")).values())
    done = saved_epoch(folder) + 1
    folder.edit(num_epochs=done + 1, n_emb=32, max_new_tokens=5)
    assert [int(epoch) for epoch, _, _ in epochs(folder.run("--resume"))] == [done]


BEFORE_REPLACING = """
import os, signal
real, calls = os.replace, []
def replace(*names):
    calls.append(names)
    if len(calls) == {n}:
        os.kill(os.getpid(), signal.{signal})
    real(*names)
os.replace = replace
"""


@unix
@pytest.mark.parametrize("n, epochs_saved", [(1, 0), (2, 0), (3, 1), (4, 2)])
def test_killed_at_each_step_of_saving(trained, n, epochs_saved):
    """A new run in the folder of another: that one is kept, and neither is taken for the other."""
    before = trained.files()
    trained.edit(seed=1)
    trained.run(before=BEFORE_REPLACING.format(n=n, signal="SIGKILL"))
    if n > 1:
        assert trained.read("former.safetensors") == before["model.safetensors"]
    assert trained.read("completions.txt") == before["completions.txt"]
    if epochs_saved:
        assert notes_of(trained)["seed"] == 1 and saved_epoch(trained) == epochs_saved - 1
    else:
        assert trained.read("model.safetensors") == before["model.safetensors"]
        assert "seed 0 to 1" in complaint(trained, "--resume")


def interrupted(process, interrupt):
    """What a process prints after interrupt(), which is repeated while it goes on.

    An interrupt that comes while the first step is compiled is ignored. And in a run that is not
    compiled, MLX's tree_unflatten, which catches whatever is raised while it looks at a key, now
    and then catches Ctrl-C.
    """
    for _ in range(60):
        interrupt()
        try:
            return process.communicate(timeout=1)
        except subprocess.TimeoutExpired:
            pass
    raise AssertionError("Ctrl-C does not end it")


def check_end(folder, process, error):
    """A run was stopped: in one line, which says what the file holds; how many epochs."""
    assert process.returncode == 130, error
    assert not list(folder.path.glob("tmp-*"))
    held, words = re.fullmatch(STOPPED, error.strip()).groups()
    assert words == ("" if held == "0" else ". --resume goes on from there")
    return int(held)


@unix
@pytest.mark.parametrize("after", ["The text", "Epoch 1"])
def test_ctrl_c(folder, after):
    folder.edit(num_epochs=10_000)
    process = folder.start()
    read_until(process, after)
    _, error = interrupted(process, lambda: process.send_signal(signal.SIGINT))
    done = check_end(folder, process, error)
    assert done == (saved_epoch(folder) + 1 if "model.safetensors" in folder.files() else 0)
    if after == "Epoch 1":
        assert done >= 2
        folder.edit(num_epochs=done + 1)
        assert [int(epoch) for epoch, _, _ in epochs(folder.run("--resume"))] == [done]


@unix
@pytest.mark.parametrize("code, done", [
    (BEFORE_REPLACING.format(n=1, signal="SIGINT"), 0),
    (BEFORE_REPLACING.format(n=3, signal="SIGINT"), 1),
    (AFTER_AN_EPOCH.format(n=1, signal="SIGINT"), 2)])
def test_ctrl_c_at_chosen_moments(trained, code, done):
    before = trained.files()
    trained.edit(seed=1, num_epochs=3)
    process = trained.start(before=code)
    _, error = process.communicate(timeout=60)
    assert check_end(trained, process, error) == done
    if done:
        assert saved_epoch(trained) + 1 == done
    else:
        assert trained.files() == before


@unix
def test_ctrl_c_while_writing(trained):
    before = trained.files()
    trained.edit(max_new_tokens=10**8, num_epochs=3)
    for arguments in (["--sample"], ["--resume"]):
        process = trained.start(*arguments)
        if arguments == ["--resume"]:
            read_until(process, "--sample")
        else:
            process.stdout.read(20)
        _, error = interrupted(process, lambda: process.send_signal(signal.SIGINT))
        assert process.returncode == 130
        assert error.strip() == "train.py: stopped"
        assert trained.read("completions.txt") == before["completions.txt"]


def test_resume_with_harmless_changes(trained):
    trained.edit(num_epochs=4, temperature=0.1, top_k=5, max_new_tokens=30)
    assert [int(epoch) for epoch, _, _ in epochs(trained.run("--resume"))] == [2, 3]
    assert len(trained.read("completions.txt")) == 30
    assert len(notes_of(trained)["history"]) == notes_of(trained)["num_epochs"] == 4
    line = complaint(trained, "--resume")
    assert "finished" in line and "num_epochs" in line


def resumed(monkeypatch):
    """What --resume begins with: the model, the optimizer, and the best weights."""
    found = []

    def first_epoch(model, optimizer, *_):
        found.extend((model, optimizer))
        yield 9, math.inf, 9.0  # is worse than the best, and ends the run

    def keeping(run, tree):
        adopt(run, tree)
        found.append({name: w for name, w in run.parameters().items()
                      if name not in ("last", "optimizer")})

    adopt = train.adopt
    with monkeypatch.context() as patched:
        patched.setattr(train, "train", first_epoch)
        patched.setattr(train, "adopt", keeping)
        with pytest.raises(train.Refusal) as end:
            train.train_and_write(resuming=True)
    if "losses are" not in str(end.value):
        raise end.value
    best, model, optimizer = found
    return model, optimizer, best


CHANGES = dict(ctx_len=8, n_emb=32, n_heads=4, n_layers=2, dropout=0.1, batch_size=8, lr=2e-2,
               warmup_steps=4, weight_decay=0.2, beta1=0.8, beta2=0.95, max_norm=2.0, seed=1)


@pytest.mark.parametrize("name, value", CHANGES.items())
def test_resume_refuses_other_settings(here, tiny, first_run, monkeypatch, name, value):
    shutil.copy(first_run[0].path / "model.safetensors", here)
    tiny(num_epochs=3)
    resumed(monkeypatch)
    tiny(**{name: value})
    with pytest.raises(train.Refusal) as end:
        resumed(monkeypatch)
    assert f"run: {name} {TINY[name]} to {value}" in str(end.value)
    assert "\n" not in str(end.value)
    assert not any(other in str(end.value) for other in CHANGES.keys() - {name})


def test_resume_refuses_another_text(trained):
    trained.edit(num_epochs=3)
    for text in (TEXT[:-3] + TEXT[-2] + TEXT[-3] + "\n", TEXT + TEXT[:50], TEXT + "Ω"):
        assert text != TEXT
        trained.write("input.txt", text)
        assert re.search(r"is of another run: input.txt \w{16} to \w{16}$",
                         complaint(trained, "--resume"))


def test_a_new_run_keeps_the_former_one(trained):
    def best(name):
        return f"{min(val for _, val in notes_of(trained, name)['history']):.4f}"

    first = trained.read("model.safetensors")
    trained.edit(lr=2e-2, num_epochs=1)
    result = trained.run()
    assert len(epochs(result)) == 1 and trained.read("former.safetensors") == first
    line = result.stdout.splitlines()[-1]
    assert line.startswith("Since former.safetensors: ")
    assert "lr 0.01 to 0.02" in line and "seed" not in line and "n_emb" not in line
    assert f"{best('former.safetensors')} to {best('model.safetensors')}" in line

    trained.edit(lr=2e-2, num_epochs=2)
    assert len(epochs(trained.run("--resume"))) == 1
    assert trained.read("former.safetensors") == first  # it is the same run that goes on
    second = trained.read("model.safetensors")
    trained.write("input.txt", TEXT + TEXT[:99])
    trained.edit(num_epochs=1)
    result = trained.run()
    assert len(epochs(result)) == 1 and trained.read("former.safetensors") == second
    assert "former.safetensors" not in result.stdout  # losses of other texts say nothing


def test_a_former_file_that_is_not_ours(folder):
    folder.write("model.safetensors", b"Sonnet 18")
    folder.edit(num_epochs=1)
    assert len(epochs(folder.run())) == 1
    assert folder.read("former.safetensors") == b"Sonnet 18"
    assert len(folder.read("completions.txt")) == 40


def test_two_runs_in_one_folder(trained):
    wait = """
import os, pathlib, time
real = pathlib.Path.read_bytes
def read_bytes(path):
    open("ready", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.01)
    return real(path)
pathlib.Path.read_bytes = read_bytes
"""
    trained.edit(seed=1)
    process = trained.start(before=wait)
    wait_for((trained.path / "ready").exists)  # it is about to copy the former run
    trained.edit(seed=2)
    other = epochs(trained.run())
    trained.write("go", "")
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == ""
    assert len(EPOCH.findall(output)) == len(other) == 2 and EPOCH.findall(output) != other
    for name, seed, lines in (("model.safetensors", 1, EPOCH.findall(output)),
                              ("former.safetensors", 2, other)):
        notes = notes_of(trained, name)
        assert notes["seed"] == seed and lines == [
            (str(i), f"{t:.4f}", f"{v:.4f}") for i, (t, v) in enumerate(notes["history"])]
    assert not list(trained.path.glob("tmp-*"))


# What can be wrong


@pytest.mark.parametrize("content, words", [
    (b"", "input.txt, of 0 characters, is too short for a batch of 4 rows of 12"),
    (b"to be or not to be", "input.txt, of 18 characters, is too short"),
    (b"to be or not" * 99 + b"\xff" + b"to be", "input.txt is not UTF-8: "),
    (b"\xef\xbb\xbf" + b"to be" * 99 + b"\xc3", "position 495"),  # the mark does not count
])
def test_useless_input(folder, content, words):
    folder.write("input.txt", content)
    assert words in complaint(folder)


@pytest.mark.parametrize("ctx_len, batch_size", [(1, 1), (12, 4), (7, 3), (10, 30)])
def test_the_shortest_text_that_will_do(folder, ctx_len, batch_size):
    """A batch of rows and one row more to train on, and one row to validate with."""
    needed = max(-(-(batch_size + 1) * ctx_len * 10 // 9), 10 * ctx_len + 1)
    folder.edit(ctx_len=ctx_len, batch_size=batch_size, num_epochs=1)
    folder.write("input.txt", ("abc" * needed)[: needed - 1])
    assert f"of {needed - 1} characters, is too short for a batch of {batch_size}" in complaint(folder)
    folder.write("input.txt", ("abc" * needed)[:needed])
    assert len(epochs(folder.run())) == 1


def test_a_text_of_a_single_character(folder):
    folder.edit(num_epochs=1)
    folder.write("input.txt", "a" * 5000)
    result = folder.run()
    assert epochs(result) == [("0", "0.0000", "0.0000")]
    assert "  val " not in result.stdout  # of a single epoch there is no curve
    assert folder.read("completions.txt") == b"a" * 40


def test_no_input(folder):
    (folder.path / "input.txt").unlink()
    assert complaint(folder) == f"train.py: {FileNotFoundError(2, os.strerror(2), 'input.txt')}\n"
    (folder.path / "input.txt").mkdir()
    assert "'input.txt'" in complaint(folder)


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="who may do everything")
@pytest.mark.parametrize("name", ["input.txt", "model.safetensors", "completions.txt"])
def test_no_permission(trained, name):
    (trained.path / name).chmod(0o200 if name == "input.txt" else 0o400)
    trained.edit(seed=1)
    result = trained.run()
    assert result.returncode == 2 and f"Permission denied: '{name}'" in result.stderr


WHOLE = "ctx_len n_emb n_heads n_layers num_epochs batch_size max_new_tokens top_k".split()
REAL = "lr max_norm weight_decay temperature dropout beta1 beta2".split()


@pytest.mark.parametrize("name, value", [
    *((name, value) for name in WHOLE for value in (0, -1, 1.5)),
    ("lr", 0), ("lr", -1e-3), ("max_norm", 0), ("weight_decay", -0.1), ("temperature", -1),
    ("dropout", 1.0), ("dropout", -0.1), ("warmup_steps", -1), ("seed", -1), ("seed", 2**32),
    ("beta1", 1.0), ("beta2", 1), ("beta1", -0.1), ("lr", 10**400), ("n_emb", 10**30),
    *((name, value) for name in ("n_emb", "seed", *REAL)
      for value in ("8", None, True, (0, 5), [0.01], (1,), {}, np.float32(0.5), np.int64(1),
                    math.nan, math.inf, 1j))])
def test_settings_that_cannot_be_used(tiny, name, value):
    tiny(**{name: value})
    with pytest.raises(train.Refusal) as end:
        train.check()
    assert str(end.value).startswith(f"{name} = {value!r} must be ")  # as it was typed
    assert "\n" not in str(end.value)


@pytest.mark.parametrize("settings", [
    dict(temperature=0), dict(top_k=10_000), dict(warmup_steps=0), dict(weight_decay=0),
    dict(dropout=0), dict(beta1=0, beta2=0), dict(seed=2**32 - 1),
    dict(lr=1, max_norm=1), {}])
def test_settings_that_can_be_used(tiny, settings):
    tiny(**settings)
    checked = train.check()
    assert json.loads(json.dumps(checked)) == checked
    assert checked.keys() == TINY.keys() - {"small"}


@pytest.mark.parametrize("settings, words", [
    (dict(n_heads=3), "n_emb = 16 must be a multiple of n_heads = 3"),
    (dict(dropout=1.0), "dropout = 1.0 must be"), (dict(lr="3e-3"), "lr = '3e-3' must be"),
    (dict(lr=(3e-3,)), "lr = (0.003,) must be")])
def test_useless_settings_end_a_run(folder, settings, words):
    folder.edit(**settings)
    assert words in complaint(folder)


@pytest.mark.parametrize("arguments", [["--resume"], ["--sample"], ["--look", "7"]])
def test_no_file_or_not_ours(folder, first_run, arguments):
    words = "model.safetensors is missing, unreadable or damaged: train.py makes one"
    assert words in complaint(folder, *arguments)
    whole = first_run[0].read("model.safetensors")
    for damaged in (b"Sonnet 18", whole[: len(whole) // 2]):
        folder.write("model.safetensors", damaged)
        assert words in complaint(folder, *arguments)


def sha256_of(arrays, notes):
    """The fingerprint that belongs into the file of a run."""
    digest = hashlib.sha256(json.dumps(notes).encode())
    for name in sorted(arrays):
        digest.update(np.array(arrays[name]).tobytes())
    return digest.hexdigest()


def write_run(arrays, notes, sha256=None):
    """Makes a file of a run with a fingerprint, the right one or another."""
    mx.save_safetensors("model.safetensors", arrays, {
        "notes": json.dumps(notes), "sha256": sha256 or sha256_of(arrays, notes)})


@pytest.fixture
def changed_file(here, tiny, first_run):
    """Call it with a function that changes arrays and notes of a run, of which the file is made.

    As if an edited script had saved it; or, with forged=True, something else than a script.
    """
    arrays, metadata = mx.load(str(first_run[0].path / "model.safetensors"), return_metadata=True)
    notes = json.loads(metadata["notes"])
    tiny(num_epochs=3)

    def change(function, forged=False):
        function(arrays, notes)
        write_run(arrays, notes, metadata["sha256"] if forged else None)
    return change


def test_resume_goes_on_from_the_last_weights_and_keeps_the_best(changed_file, monkeypatch):
    saved = {}

    def change(arrays, notes):
        arrays["wte.weight"] = arrays["wte.weight"] + 1  # so that the best are not the last
        saved.update(arrays)

    changed_file(change)
    model, optimizer, best = resumed(monkeypatch)
    trees = {"": best, "last.": model.parameters(), "optimizer.": optimizer.state}
    for prefix, tree in trees.items():
        for name, found in tree_flatten(tree):
            assert mx.array_equal(found, saved[prefix + name]), prefix + name


@pytest.mark.parametrize("size", [0, 7, 8, 9, 100, 10_000, -1])
def test_file_that_is_cut(here, first_run, size):
    (here / "model.safetensors").write_bytes(first_run[0].read("model.safetensors")[:size])
    with pytest.raises(train.Refusal, match="damaged"):
        train.load("model.safetensors")


def test_file_with_a_bit_that_is_wrong(here, first_run):
    whole = first_run[0].read("model.safetensors")
    (here / "model.safetensors").write_bytes(whole)
    train.load("model.safetensors")
    begin = whole.index(b'"notes"')
    for place in (begin + 12, begin + 300, whole.index(b'"sha256"') + 15, len(whole) // 3,
                  len(whole) // 2, len(whole) - 1):
        changed = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        (here / "model.safetensors").write_bytes(changed)
        with pytest.raises(train.Refusal, match="damaged"):
            train.load("model.safetensors")


def first_of(arrays, end, start=""):
    return next(name for name in arrays if name.endswith(end) and name.startswith(start))


@pytest.mark.parametrize("change", [
    lambda a, n: a.update({"wte.weight": mx.full((33, 16), mx.nan)}),
    lambda a, n: a.update({"last.wpe.weight": mx.full((12, 16), mx.inf)}),
    lambda a, n: a.update({first_of(a, ".m"): mx.array(mx.nan)}),
    lambda a, n: [a.pop(name) for name in list(a) if name.startswith("last.")],
    lambda a, n: [a.pop(name) for name in list(a) if name.startswith("optimizer.")],
    lambda a, n: n.clear(),
    *(partial(lambda key, a, n: n.pop(key), key)
      for key in ("vocab", "input.txt", "history", "n_emb", "beta1", "seed")),
    *(partial(lambda key, value, a, n: n.update({key: value}), *pair) for pair in [
        ("vocab", "ba"), ("vocab", "aab"), ("vocab", None), ("vocab", 3), ("input.txt", None),
        ("history", []), ("history", None), ("history", [[1.0, math.nan]]), ("history", [1.0, 2.0]),
        ("history", [[1.0]]), ("history", [["1", "2"]]), ("history", "[]"), ("n_emb", "16"),
        ("n_emb", 16.0), ("n_emb", 17), ("n_heads", 0), ("n_heads", None), ("n_layers", -1),
        ("lr", "0.01"), ("lr", None), ("dropout", 1.0), ("beta1", "0.9"),
        ("beta2", None), ("top_k", True), ("seed", {})])])
def test_file_with_senseless_contents(changed_file, change):
    changed_file(change, forged=True)
    with pytest.raises(train.Refusal, match="model.safetensors is missing, unreadable or damaged"):
        train.load("model.safetensors")


MISFITS = {
    "best": [lambda a, n: a.pop("wte.weight"), lambda a, n: a.update(new=mx.zeros(3)),
             lambda a, n: a.update({"wte.weight": mx.zeros((3, 3))}),
             lambda a, n: a.update({"wte.weight": a["wte.weight"].astype(mx.float16)}),
             lambda a, n: a.update({"wte.weight": a["wte.weight"].astype(mx.uint64)}),
             lambda a, n: n.update(vocab="ab"), lambda a, n: n.update(n_layers=2)],
    "last": [lambda a, n: a.pop("last.wte.weight"), lambda a, n: a.update({"last.x": mx.zeros(3)}),
             lambda a, n: a.update({"last.wte.weight": mx.zeros((3, 3))}),
             lambda a, n: a.pop(first_of(a, ".m")), lambda a, n: a.pop(first_of(a, ".step")),
             lambda a, n: a.update({first_of(a, "lm_head.weight.v", "opt"): mx.zeros((3, 3))})]}


@pytest.mark.parametrize("part, change", [(part, change) for part in MISFITS
                                          for change in MISFITS[part]])
def test_file_that_does_not_fit(changed_file, monkeypatch, part, change):
    """One line, whatever an edit of the script, say, has made different."""
    changed_file(lambda arrays, notes: None)
    train.load_model("7")
    resumed(monkeypatch)
    changed_file(change)
    with pytest.raises(train.Refusal) as end:
        train.load_model("7") if part == "best" else resumed(monkeypatch)
    assert "model.safetensors" in str(end.value) and "\n" not in str(end.value)


def file_size_limit(size):
    import resource  # which Windows lacks

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return limit


@unix
@pytest.mark.parametrize("arguments", [["--resume"], []])
def test_full_disk_keeps_the_last_good_file(trained, arguments):
    before = trained.files()
    trained.edit(num_epochs=3)
    result = trained.run(*arguments, preexec_fn=file_size_limit(20_000))
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr == f"train.py: {OSError(errno.EFBIG, os.strerror(errno.EFBIG))}\n"
    assert trained.files() == before  # and no half file beside them


@unix
def test_full_disk_keeps_the_last_good_text(trained):
    before = trained.files()
    trained.edit(num_epochs=3, max_new_tokens=300)
    code = "import os, errno\nreal = os.replace\n" \
           "def replace(old, new):\n" \
           "    if str(new) == 'completions.txt':\n" \
           "        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n" \
           "    real(old, new)\n" \
           "os.replace = replace"
    result = trained.run("--resume", before=code)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr == f"train.py: {OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))}\n"
    assert trained.read("completions.txt") == before["completions.txt"]
    assert not list(trained.path.glob("tmp-*"))


@pytest.mark.parametrize("name", ["completions.txt", "model.safetensors", "former.safetensors"])
def test_what_cannot_be_written_is_found_out_first(folder, name):
    (folder.path / name).mkdir()
    assert f"'{name}'" in complaint(folder)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder that nobody can write")
def test_folder_that_cannot_be_written(tiny, monkeypatch):
    monkeypatch.setattr(train, "load_text", lambda: TEXT)
    monkeypatch.chdir("/proc")
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("found out only by training"))
    with pytest.raises(OSError) as end:
        train.train_and_write(False)
    assert end.value.errno in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS)


def test_a_loss_that_is_not_finite_stops_the_run(trained):
    before = trained.files()
    trained.edit(lr=1e30, max_norm=1e30)
    result = trained.run()
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert re.match(r"train.py: loss is (nan|inf) in step \d+: lower lr", result.stderr)
    assert trained.files() == before


def test_weights_that_are_not_finite_are_not_saved(trained):
    """An epoch of a single step: its loss is good, and what it does to the weights is not."""
    before = trained.files()
    trained.edit(ctx_len=4, batch_size=30, lr=1e30, max_norm=1e30, warmup_steps=0)
    trained.write("input.txt", TEXT[:210])
    result = trained.run()
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert re.match(r"train.py: (loss is|losses are) .*(nan|inf)", result.stderr)
    assert "Epoch" not in result.stdout
    assert {**trained.files(), "input.txt": before["input.txt"]} == before


def test_a_loss_beyond_all_measure_is_reported(here, tiny, monkeypatch, capsys):
    monkeypatch.setattr(train, "train", lambda *_: iter([(0, 800.0, 800.0)]))
    train.train_and_write(resuming=False)
    assert "| val = 800.0000 |" in capsys.readouterr().out


def test_weights_of_another_type_are_kept(folder):
    """A reader who tries bfloat16, which NumPy does not know."""
    folder.source = folder.source.replace("    optimizer.init(model.trainable", "    model.set_dtype("
                                          "mx.bfloat16)\n    optimizer.init(model.trainable", 1)
    folder.edit(num_epochs=1)
    assert len(epochs(folder.run())) == 1
    header, _ = read_safetensors(folder.read("model.safetensors"))
    assert header["last.wte.weight"]["dtype"] == "BF16"
    folder.edit(num_epochs=2)
    assert len(epochs(folder.run("--resume"))) == 1


def test_output_that_is_no_file(folder):
    """As some notebooks have it."""
    result = folder.run("--help", before="import io, sys; kept, sys.stdout = sys.stdout, io.StringIO()")
    assert result.returncode == 2 and "Traceback" not in result.stderr


# Output that breaks


USES = [[], ["--sample", "7"], ["--look", "7"]]


@unix
@pytest.mark.parametrize("arguments", USES)
def test_nobody_reads_on(trained, arguments):
    reading, writing = os.pipe()
    os.close(reading)
    result = trained.run(*arguments, capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (result.returncode, result.stderr) == (2, "")


@unix
def test_reader_of_a_run_leaves(folder):
    folder.edit(num_epochs=10_000)
    process = folder.start()
    read_until(process, "Epoch 0")  # as `| head` does
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 2
    assert saved_epoch(folder) >= 0 and not list(folder.path.glob("tmp-*"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no file that is always full")
@pytest.mark.parametrize("arguments", USES)
def test_output_to_a_full_disk(trained, arguments):
    with open("/dev/full", "w") as full:
        result = trained.run(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (result.returncode, result.stderr) == (2, f"train.py: {error}\n")


@unix
@pytest.mark.parametrize("arguments", USES)
def test_closed_output(trained, arguments):
    trained.edit(max_new_tokens=10)
    result = trained.run(*arguments, capture_output=False, stderr=subprocess.PIPE,
                         preexec_fn=lambda: os.close(1))
    assert (result.returncode, result.stderr) == (0, "")
    assert len(trained.read("completions.txt")) == (40 if arguments else 10)


# What MLX compiles on a processor, it keeps in a folder


def compiling(folder, cache):
    """Options to run with mx.compile and such a folder of one's own."""
    cache.mkdir(exist_ok=True)
    environment = {**folder.command()["env"], "TMPDIR": str(cache)}
    del environment["MLX_DISABLE_COMPILE"]
    return dict(env=environment)


compiler = pytest.mark.skipif(not EXACT or os.name == "nt" or not shutil.which("g++"),
                              reason="MLX starts no compiler here")


@compiler
def test_ctrl_c_while_compiling(folder, tmp_path):
    options = compiling(folder, tmp_path / "cache")

    def libraries():  # in the order in which they were made
        made = list((tmp_path / "cache").rglob("lib*.so"))
        return sorted(made, key=lambda path: path.stat().st_mtime)

    process = folder.start(**options)
    try:
        wait_for(lambda: list((tmp_path / "cache").rglob("*.cpp")))
        for _ in range(5):  # a terminal sends it to all processes: the compiler, too
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.1)
        wait_for(lambda: len(libraries()) >= 3 or process.poll() is not None)
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        output, error = process.communicate()
    assert error == "" and "ompiling" in output.splitlines()[-1]
    first, second, *_ = libraries()
    for library in (first, second):  # they are whole
        ctypes.CDLL(str(library))

    # And if one is damaged in some other way, a run says what to do about it.
    first.unlink()  # this process has loaded that one
    first.write_bytes(b"")
    result = folder.run(**options)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert str(tmp_path / "cache") in result.stderr and "MLX_DISABLE_COMPILE=1" in result.stderr


@compiler
@pytest.mark.parametrize("arguments", [["--sample"], ["--look", "7"]])
def test_what_a_model_writes_needs_no_compiler(trained, tmp_path, arguments):
    options = compiling(trained, tmp_path / "cache")  # which Ctrl-C would reach
    assert trained.run(*arguments, **options).returncode == 0
    assert list((tmp_path / "cache").rglob("*.*")) == []


@compiler
def test_folder_for_compiling_that_cannot_be_used(folder, tmp_path):
    options = compiling(folder, tmp_path / "cache")
    (tmp_path / "cache" / "mlx").write_text("not a folder")
    for name in ("cache", "nowhere"):
        options["env"]["TMPDIR"] = str(tmp_path / name)
        result = folder.run(**options)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert "MLX_DISABLE_COMPILE=1" in result.stderr
        assert name == "nowhere" or str(tmp_path / "cache") in result.stderr


def test_an_error_of_the_readers_own_keeps_its_traceback(folder):
    result = folder.run(before="def broken(*_):\n    raise RuntimeError('an idea of mine')\n"
                               "train.evaluate = broken")
    assert result.returncode == 1 and "in broken" in result.stderr
    assert result.stderr.endswith("RuntimeError: an idea of mine\n")


@pytest.mark.parametrize("arguments", [
    ["--help"], ["--resume", "--sample"], ["--resume", "--look", "7"], ["7"], ["--look"], [""],
    ["--sample", "7", "sheep"], ["--resume", "7"]])
def test_help(folder, arguments):
    result = folder.run(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    uses = re.findall(r"^    python train.py ?(--\w+)?", result.stderr, re.M)
    assert uses == ["", "--sample", "--look", "--resume"] and "Traceback" not in result.stderr
    assert set(folder.files()) == {"input.txt"}
