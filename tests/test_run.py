"""Sections 11 to 13 as a user meets them: whole runs of an edited copy in a folder of its own."""

import io
import json
import math
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
import train
from conftest import ROOT, TEXT

EPOCH = re.compile(r"^Epoch (\d+) \| train = (\d\.\d{4}) \| val = (\d\.\d{4}) \| "
                   r"[\d,]+ characters/s \| \d+:\d\d left$", re.M)


def epochs(result):
    assert result.returncode == 0, result.stderr
    return EPOCH.findall(result.stdout)


def complaint(folder, *arguments, **options):
    """Runs the script, which must refuse in one line and change no file; returns the line."""
    before = folder.files()
    result = folder.run(*arguments, **options)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("train.py: ")
    assert "Traceback" not in result.stderr and "Epoch" not in result.stdout
    assert folder.files() == before
    return result.stderr


def test_import_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train"
    result = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, text=True,
                            capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []  # and no input.txt was needed


def test_whole_run_compiled(folder):
    """The only run here with mx.compile: as a user runs it."""
    folder.edit(num_epochs=3, max_new_tokens=200)
    result = folder.run(env=dict(os.environ))
    lines = epochs(result)
    assert [int(epoch) for epoch, _, _ in lines] == [0, 1, 2]
    assert float(lines[-1][2]) < float(lines[0][2]) < math.log(len(set(TEXT))) + 0.1
    if mx.default_device() == mx.cpu:
        assert result.stdout.startswith(
            "MLX finds no GPU here, so this is the small model: ctx_len 12, n_emb 16, n_layers 2, "
            "batch_size 4, num_epochs 3.\n")
    written = (folder.path / "completions.txt").read_text(encoding="utf-8")
    assert len(written) == 200 and set(written) <= set(TEXT) and len(set(written)) > 5
    assert result.stdout.endswith(written + "\n")
    # Compiled or not, the losses are the same but for rounding.
    plain = epochs(folder.run())
    assert np.allclose(np.array(lines, float), np.array(plain, float), atol=2e-3)


def test_same_seed_same_losses_and_text(folder):
    first = folder.run()
    files = folder.files()
    second = folder.run()
    assert epochs(first) == epochs(second)
    assert files == folder.files()
    folder.edit(seed=1)
    assert epochs(folder.run()) != epochs(first)
    assert folder.files()["completions.txt"] != files["completions.txt"]


def test_completions_begin_on_a_new_line(folder):
    folder.edit(num_epochs=1)
    (folder.path / "input.txt").write_text(TEXT.replace(";", "\t"))  # a tab sorts before it
    folder.run()
    completions = (folder.path / "completions.txt").read_text(encoding="utf-8")
    assert folder.run("--sample", "\n").stdout == "\n" + completions + "\n"


@pytest.mark.skipif(mx.default_device() == mx.gpu, reason="for processors only")
@pytest.mark.parametrize("batch_size, streams", [(4, 2), (5, 1)])
def test_an_even_batch_is_shared_by_two_cores(folder, batch_size, streams):
    line = "    loss_and_grad = nn.value_and_grad(model, loss_fn)\n"
    assert folder.source.count(line) == 1
    folder.source = folder.source.replace(
        line, line + "    print('streams:', len(getattr(loss_fn, 'args', [[0]])[0]))\n")
    folder.edit(batch_size=batch_size, num_epochs=1)
    assert f"\nstreams: {streams}\n" in folder.run().stdout


def test_curve_of_block_characters(capsys):
    train.draw_curve("val", [3.0, 2.0, 1.0])
    train.draw_curve("train", [1.5])
    assert capsys.readouterr().out == "  val 3.0000 █▅▁ 1.0000\ntrain 1.5000 ▁ 1.5000\n"


def test_curve_closes_a_run(folder):
    result = folder.run()
    (_, t0, v0), (_, t1, v1) = epochs(result)
    assert f"train {t0} █▁ {t1}\n  val {v0} █▁ {v1}\n" in result.stdout


def in_terminal(folder, *arguments):
    """Runs the script with a terminal as its output and returns all that was sent there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(**{**folder.command(*arguments), "text": False, "encoding": None},
                               stdout=theirs, stderr=theirs)
    os.close(theirs)
    sent = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            part = b""
        if not part:
            os.close(ours)
            assert process.wait() == 0
            return sent.decode()
        sent += part


def test_progress_line_in_a_terminal_only(folder):
    screen = in_terminal(folder)
    assert re.search(r"\rEpoch 0, step 10 of \d\d, loss \d\.\d{4}", screen)
    assert re.search(r"\r\x1b\[KEpoch 0 \| train = ", screen)  # which the epoch's line replaces
    plain = folder.run().stdout
    assert "step" not in plain and "\r" not in plain and "\x1b" not in plain


# Saving and sampling


def read_safetensors(data):
    """The header of a safetensors file, read by its specification, without MLX."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert 8 + length + max(a["data_offsets"][1] for a in header.values()) == len(data)
    return header, metadata


def test_saved_files(folder):
    folder.edit(num_epochs=3)
    lines = epochs(folder.run())
    files = folder.files()
    assert set(files) == {"input.txt", "completions.txt", "model.safetensors",
                          "checkpoint.safetensors"}
    header, metadata = read_safetensors(files["model.safetensors"])
    assert header["wte.weight"]["shape"] == [len(set(TEXT)), 16]
    assert header["blocks.1.mha.q_proj.weight"]["dtype"] == "F32"
    assert json.loads(metadata["vocab"]) == "".join(sorted(set(TEXT)))
    constants = json.loads(metadata["constants"])
    assert (constants["n_emb"], constants["ctx_len"], constants["lr"]) == (16, 12, 1e-2)
    best = min(lines, key=lambda line: float(line[2]))
    assert metadata["epoch"] == best[0] and f"{float(metadata['loss']):.4f}" == best[2]
    header, metadata = read_safetensors(files["checkpoint.safetensors"])
    assert metadata["epoch"] == "2"
    history = json.loads(metadata["history"])
    assert [[f"{x:.4f}" for x in pair] for pair in history] == [[t, v] for _, t, v in lines]
    assert any(".m" in name for name in header) and any(".v" in name for name in header)


def test_model_file_holds_the_best_epoch(folder):
    (folder.path / "input.txt").write_text("ab" * 900 + "ba" * 20 + "aabb" * 40)
    folder.edit(num_epochs=4)  # the end is unlike the rest: the better learnt, the worse it goes
    lines = epochs(folder.run())
    vals = [float(val) for _, _, val in lines]
    assert min(vals) < vals[-1]
    _, metadata = read_safetensors(folder.files()["model.safetensors"])
    assert int(metadata["epoch"]) == vals.index(min(vals))


def test_sample_continues_a_prompt(folder):
    folder.run()
    files = folder.files()
    (folder.path / "input.txt").unlink()
    first = folder.run("--sample", "7 sheep")
    assert first.returncode == 0 and first.stderr == ""
    assert first.stdout.startswith("7 sheep") and len(first.stdout) == 7 + 40 + 1
    assert folder.run("--sample", "7 sheep").stdout == first.stdout
    alone = folder.run("--sample").stdout
    assert alone[0] == "\n" and len(alone) == 1 + 40 + 1
    assert folder.run("--sample", "").stdout == alone
    longer = folder.run("--sample", TEXT[:50]).stdout  # than ctx_len
    assert longer.startswith(TEXT[:50]) and len(longer) == 50 + 40 + 1
    assert {**folder.files(), "input.txt": files["input.txt"]} == files  # nothing was written


def test_sample_is_by_the_constants_in_the_file(folder):
    folder.run()
    before = folder.run("--sample", "7").stdout
    folder.edit(n_emb=30, n_heads=7, ctx_len=5, n_layers=9, dropout=1.0, batch_size=0, lr=-1)
    assert folder.run("--sample", "7").stdout == before
    folder.edit(max_new_tokens=25, temperature=0, n_emb=8)
    greedy = folder.run("--sample", "7").stdout
    assert len(greedy) == 1 + 25 + 1 and greedy[:-1] != before[:26]
    folder.edit(seed=5)
    assert folder.run("--sample", "7").stdout != before


def test_text_of_another_world(folder):
    text = "🌙 床前明月光,疑是地上霜。\r\n举头望明月,低头思故乡。 🌕\r\n" * 30
    (folder.path / "input.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(epochs(folder.run())) == 2
    written = (folder.path / "completions.txt").read_text(encoding="utf-8")
    assert len(written) == 40 and set(written) <= set(text) - {"\r"}
    assert folder.run("--sample", "床前").stdout.startswith("床前")
    ascii_terminal = {**os.environ, "PYTHONIOENCODING": "ascii", "MLX_DISABLE_COMPILE": "1"}
    assert folder.run("--sample", "床", env=ascii_terminal).returncode == 0


# Going on


def test_resumed_run_equals_one_without_a_break(folder):
    folder.edit(num_epochs=4, dropout=0.2)
    whole = epochs(folder.run())
    expected = folder.files()
    for name in ("model.safetensors", "checkpoint.safetensors", "completions.txt"):
        (folder.path / name).unlink()
    process = subprocess.Popen(**folder.command(), stdout=subprocess.PIPE)
    read_until(process, "Epoch 1")
    process.kill()
    process.communicate()
    rest = epochs(folder.run("--resume"))
    assert 2 <= len(rest) <= 3 and rest == whole[-len(rest) :]
    found = folder.files()
    assert found.keys() == expected.keys()
    for name in found:  # the same weights, optimizer, losses and text, to the last bit
        if name.endswith(".safetensors"):
            assert read_safetensors(found[name])[1] == read_safetensors(expected[name])[1]
            mine, theirs = arrays(found[name]), arrays(expected[name])
            assert mine.keys() == theirs.keys()
            assert all(np.array_equal(mine[key], theirs[key]) for key in mine)
        else:
            assert found[name] == expected[name]


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


def read_until(process, words):
    """Reads what a process prints up to the line with these words, which must come."""
    assert any(words in line for line in process.stdout)


def saved_epoch(folder):
    """The number of the epoch in the checkpoint."""
    data = (folder.path / "checkpoint.safetensors").read_bytes()
    return int(read_safetensors(data)[1]["epoch"])


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("moment", [0.0, 0.3, 0.7, 1.3])
def test_killed_at_any_moment_leaves_whole_files(folder, moment):
    folder.edit(num_epochs=10_000, n_emb=32)
    process = subprocess.Popen(**folder.command(), stdout=subprocess.PIPE)
    process.stdout.readline()
    wait_for((folder.path / "checkpoint.safetensors").exists)
    time.sleep(moment)
    process.kill()
    process.communicate()
    for name in ("model.safetensors", "checkpoint.safetensors"):
        read_safetensors((folder.path / name).read_bytes())
        saved = mx.load(str(folder.path / name))
        assert all(np.isfinite(np.array(array)).all() for array in saved.values())
    done = saved_epoch(folder) + 1
    folder.edit(num_epochs=done + 1, n_emb=32)
    assert [int(epoch) for epoch, _, _ in epochs(folder.run("--resume"))] == [done]


def interrupted(process, interrupt):
    """What a process prints after interrupt(), once more if that gets lost.

    In a run that is not compiled, MLX's tree_unflatten, which catches whatever is raised while it
    looks at a key, now and then catches Ctrl-C.
    """
    for _ in range(4):
        interrupt()
        try:
            return process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            pass
    raise AssertionError("Ctrl-C does not end it")


@pytest.mark.parametrize("after", ["characters", "Epoch 1"])
def test_ctrl_c(folder, after):
    folder.edit(num_epochs=10_000)
    process = subprocess.Popen(**folder.command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    read_until(process, after)
    if after == "Epoch 1":
        wait_for(lambda: saved_epoch(folder) >= 1)
    _, error = interrupted(process, lambda: process.send_signal(signal.SIGINT))
    assert process.returncode == 130
    assert error.startswith("train.py: stopped") and error.count("\n") == 1
    assert not list(folder.path.glob("*.tmp*"))
    if after == "Epoch 1":
        done = 1 + int(re.search(r"Epochs 0 to (\d+) are saved: --resume", error)[1])
        assert done >= 2
        folder.edit(num_epochs=done + 1)
        assert [int(epoch) for epoch, _, _ in epochs(folder.run("--resume"))] == [done]


def test_ctrl_c_while_sampling(folder):
    folder.run()
    folder.edit(max_new_tokens=10**9)
    process = subprocess.Popen(**folder.command("--sample"), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error


def test_resume_with_harmless_changes(folder):
    folder.run()
    folder.edit(num_epochs=4, temperature=0.1, lr=1e-3, batch_size=7, weight_decay=0.0)
    assert [int(epoch) for epoch, _, _ in epochs(folder.run("--resume"))] == [2, 3]
    folder.edit(num_epochs=3)
    nothing_left = folder.run("--resume")
    assert epochs(nothing_left) == [] and "  val " in nothing_left.stdout
    assert len((folder.path / "completions.txt").read_text()) == 40


def test_learning_rate_after_resuming_with_larger_batches(folder):
    folder.edit(num_epochs=4)
    folder.run()
    folder.edit(num_epochs=5, batch_size=16)  # fewer steps in all than were already taken
    (_, loss, _), = epochs(folder.run("--resume"))
    arrays = mx.load(str(folder.path / "checkpoint.safetensors"))
    steps = (len(TEXT) * 9 // 10 // 12 - 1) // 16
    assert arrays["optimizer.states.0.step"].item() == 5 * steps
    assert 0 < arrays["optimizer.states.0.learning_rate"].item() < 1e-2
    assert float(loss) < math.log(len(set(TEXT)))


@pytest.mark.parametrize("name, saved, present", [
    ("n_emb", 16, 32), ("n_heads", 2, 4), ("n_layers", 2, 1), ("ctx_len", 12, 8)])
def test_resume_with_other_architecture(folder, name, saved, present):
    folder.run()
    folder.edit(**{name: present})
    line = complaint(folder, "--resume")
    assert f"{name} = {saved}" in line and str(present) in line


def test_resume_with_other_text(folder):
    folder.run()
    (folder.path / "input.txt").write_text(TEXT + "Ω")
    assert "input.txt has other characters" in complaint(folder, "--resume")


# What can be wrong


@pytest.mark.parametrize("content, words", [
    (b"", "input.txt has 0 characters"),
    (b"to be or not to be", "input.txt has 18 characters; ctx_len = 12 and batch_size = 4 need "
                            "at least 67"),
    (b"a" * 5000, "one distinct character, 'a'"),
    (b"to be or not" * 99 + b"\xff" + b"to be", "not UTF-8 text: it goes wrong at byte 1188"),
    (b"\xef\xbb\xbf" + b"to be" * 99 + b"\xc3", "byte 498"),
])
def test_useless_input(folder, content, words):
    (folder.path / "input.txt").write_bytes(content)
    assert words in complaint(folder)


@pytest.mark.parametrize("ctx_len, batch_size", [(1, 1), (12, 4), (7, 3), (10, 9)])
def test_the_number_of_characters_needed_is_true(folder, ctx_len, batch_size):
    folder.edit(ctx_len=ctx_len, batch_size=batch_size, num_epochs=1)
    (folder.path / "input.txt").write_text("ab")
    needed = int(re.search(r"at least (\d+)", complaint(folder))[1])
    (folder.path / "input.txt").write_text(("abc" * needed)[: needed - 1])
    assert f"at least {needed}" in complaint(folder)
    (folder.path / "input.txt").write_text(("abc" * needed)[:needed])
    assert len(epochs(folder.run())) == 1


def test_no_input(folder):
    (folder.path / "input.txt").unlink()
    assert "cannot use input.txt: No such file" in complaint(folder)
    (folder.path / "input.txt").mkdir()
    assert "cannot use input.txt: Is a directory" in complaint(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_no_permission(folder):
    (folder.path / "input.txt").chmod(0)
    assert "cannot use input.txt: Permission denied" in complaint(folder)


@pytest.mark.parametrize("name, value", [
    *((name, value) for value in (0, -1, 1.5)
      for name in ("ctx_len", "n_emb", "n_heads", "n_layers", "num_epochs", "batch_size",
                   "max_new_tokens", "top_k")),
    ("lr", 0), ("lr", -1e-3), ("max_norm", 0), ("weight_decay", -0.1), ("temperature", -1),
    ("dropout", 1.0), ("dropout", -0.1), ("warmup_steps", -1), ("seed", -1),
    ("betas", (0.9, 1.0)), ("betas", (0.9,))])
def test_settings_out_of_range(tiny, capsys, name, value):
    tiny(**{name: value})
    with pytest.raises(SystemExit) as end:
        train.check_settings()
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.startswith(f"train.py: {name} = {value} must be ")


@pytest.mark.parametrize("settings", [
    dict(temperature=0), dict(top_k=10_000), dict(warmup_steps=0), dict(weight_decay=0),
    dict(dropout=0), dict(betas=(0, 0)), dict(seed=2**32 - 1), {}])
def test_settings_in_range(tiny, settings):
    tiny(**settings)
    train.check_settings()


@pytest.mark.parametrize("settings, words", [
    (dict(n_heads=3), "n_emb = 16 must be a multiple of n_heads = 3"),
    (dict(dropout=1.0), "dropout = 1.0 must be at least 0 and less than 1"),
    (dict(batch_size=0), "batch_size = 0 must be a whole number of at least 1")])
def test_useless_settings_end_a_run(folder, settings, words):
    folder.edit(**settings)
    assert words in complaint(folder)


@pytest.mark.parametrize("prompt, character", [("7 sheep!", "'!'"), ("π", "'π'")])
def test_prompt_outside_the_vocabulary(folder, prompt, character):
    folder.run()
    assert f"the character {character} is not in" in complaint(folder, "--sample", prompt)


@pytest.mark.parametrize("arguments, file", [(["--resume"], "checkpoint.safetensors"),
                                             (["--sample"], "model.safetensors")])
def test_no_file_or_not_ours(folder, arguments, file):
    assert f"there is no {file}" in complaint(folder, *arguments)
    folder.run()
    path = folder.path / file
    whole = path.read_bytes()
    other = "checkpoint" if "model" in file else "model"  # the right metadata, other arrays
    path.write_bytes((folder.path / f"{other}.safetensors").read_bytes())
    assert f"{file} is damaged, or was not written by this script" in complaint(folder, *arguments)
    for damaged in (b"", *(whole[:size] for size in (7, 100, len(whole) // 2, -1)), b"Sonnet 18"):
        path.write_bytes(damaged)
        assert f"{file} is damaged" in complaint(folder, *arguments)
    mx.save_safetensors(str(path), {"a": mx.zeros(3)}, {"epoch": "1"})
    assert f"{file} is damaged" in complaint(folder, *arguments)


def file_size_limit(size):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return limit


def test_full_disk_keeps_the_last_good_file(folder):
    folder.run()
    before = folder.files()
    folder.edit(num_epochs=3)
    result = folder.run("--resume", preexec_fn=file_size_limit(20_000))
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert re.match(r"train.py: cannot write (model|checkpoint).safetensors, which is as it was",
                    result.stderr)
    assert folder.files() == before  # and no half file beside them
    folder.path.joinpath("model.safetensors").unlink()
    folder.path.joinpath("checkpoint.safetensors").unlink()
    result = folder.run(preexec_fn=file_size_limit(20_000))
    assert result.returncode == 2 and not list(folder.path.glob("*.safetensors"))


def test_completions_that_cannot_be_written(folder):
    (folder.path / "completions.txt").mkdir()
    result = folder.run()
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr == "train.py: cannot use completions.txt: Is a directory\n"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder that nobody can write")
def test_folder_that_cannot_be_written(tiny, monkeypatch, capsys):
    tokenizer = train.CharTokenizer(TEXT)
    monkeypatch.setattr(train, "load_tokens", lambda: (tokenizer, np.array(tokenizer.encode(TEXT))))
    monkeypatch.chdir("/proc")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as end:
        train.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and "Epoch" not in sys.stdout.buffer.getvalue().decode()
    assert error.startswith("train.py: cannot use ") and error.count("\n") == 1


def test_a_loss_that_is_not_finite(folder):
    folder.edit(lr=1e30, max_norm=1e30)
    result = folder.run()
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert re.match(r"train.py: the loss is (nan|inf) in epoch 0, step \d+: lower lr = 1e\+30",
                    result.stderr)
    assert not list(folder.path.glob("*.safetensors"))


def test_help(folder):
    result = folder.run("--help")
    assert result.returncode == 0
    for option in ("--resume", "--sample [PROMPT]", "checkpoint.safetensors", "model.safetensors"):
        assert option in result.stdout
    assert set(re.findall(r"--\w+", result.stdout)) == {"--help", "--resume", "--sample"}
    assert folder.run("--resume", "--sample").returncode == 2
