"""What can be wrong: one clear line, and nothing that was saved is lost."""

import math
import re

import mlx.core as mx
import pytest
import train
from helpers import SOURCE, TEXT, epochs, module_from, refused, unix


def test_a_refusal_is_one_line_and_a_status(folder):
    folder.edit(n_heads=3)
    result = folder.run()
    assert result.returncode == 1 and result.stdout == "" and "Traceback" not in result.stderr
    assert re.match(r"train.py: .*n_heads = 3", result.stderr.splitlines()[-1])
    assert set(folder.files()) == {"input.txt"}


@pytest.mark.parametrize("name, value", [
    ("n_heads", 3), ("ctx_len", 0), ("n_emb", 0), ("n_heads", 0), ("n_layers", -1),
    ("num_epochs", 0), ("batch_size", 0), ("max_new_tokens", 0), ("top_k", 0), ("dropout", -0.1),
    ("lr", -1e-3), ("warmup_steps", -5), ("weight_decay", -0.1), ("max_norm", math.nan),
    ("seed", -1), ("temperature", -1)])
def test_settings_that_make_no_sense(folder, tiny, command, name, value):
    tiny(**{name: value})
    assert f"{name} = {value!r}" in refused(folder, command)


USELESS = {"missing": None, "empty": b"", "not UTF-8": TEXT.encode() + b"\xff",
           "UTF-16": TEXT.encode("utf-16"), "too few rows for a batch": TEXT[:60].encode()}


@pytest.mark.parametrize("content", USELESS.values(), ids=USELESS)
def test_texts_that_cannot_be_used(folder, command, content):
    (folder.path / "input.txt").unlink()
    if content is not None:
        folder.write("input.txt", content)
    line = refused(folder, command)
    assert "input.txt" in line
    assert content is not None or str(folder.path.resolve()) in line.replace("\\\\", "\\")


@pytest.mark.parametrize("arguments, name", [
    (["--resume"], "checkpoint.safetensors"), (["--sample"], "model.safetensors"),
    (["--look", "7"], "model.safetensors")])
def test_files_that_cannot_be_used(trained, tiny, command, arguments, name):
    """Damaged ones, those of other programs, and those of other versions of train.py."""
    tiny(num_epochs=3)
    other = ({"model.safetensors", "checkpoint.safetensors"} - {name}).pop()
    arrays, notes = mx.load(name, return_metadata=True)
    saved = [({"weight": mx.zeros(3)}, {}), ({**arrays, "model.new": mx.ones(1)}, notes),
             *[(arrays, {"notes": notes["notes"].replace(own, '"their_name"')})
               for own in ('"n_emb"', '"vocab"', '"settings"') if own in notes["notes"]]]
    contents = [b"", b"Sonnet 18", trained.read(name)[:-1], trained.read(other)]
    for given in saved:
        mx.save_safetensors("file.safetensors", *given)
        contents.append(trained.read("file.safetensors"))
    for content in contents:
        trained.write(name, content)
        line = refused(trained, command, *arguments)
        assert name in line or "changed since" in line
    (trained.path / name).unlink()
    assert str(trained.path.resolve() / name) in refused(trained, command, *arguments)


@pytest.mark.parametrize("seconds", [0, 20])
def test_a_loss_that_diverges_is_noticed_in_time(trained, tiny, command, steps, seconds):
    """By the next line of progress, or, where an epoch is too short for one, by its end."""
    steps.seconds = seconds
    tiny(lr=1e30, max_norm=1e30, warmup_steps=0)
    assert re.search(r"\b(nan|inf)\b.*\blr\b", refused(trained, command))
    assert len(steps.rows) <= (5 if seconds else 20)


# Lets no file grow larger than that, as if the disk were full.
SMALL_FILES = """
import resource, signal, train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
train.main()
"""


@unix
@pytest.mark.parametrize("full_for", ["model.safetensors", "checkpoint.safetensors"])
def test_a_full_disk_keeps_the_last_good_files(trained, full_for):
    before = trained.files()
    size = len(before[full_for]) - 1000  # the checkpoint is larger
    trained.edit(num_epochs=3)
    full = trained.run("--resume", code=SMALL_FILES.format(size=size))
    assert full.returncode == 1 and epochs(full.stdout) == [] and "Traceback" not in full.stderr
    assert full_for in full.stderr.splitlines()[-1]
    assert trained.read("checkpoint.safetensors") == before["checkpoint.safetensors"]
    assert len(trained.read("model.safetensors")) == len(before["model.safetensors"])
    assert not list(trained.path.glob("unfinished-*"))
    assert epochs(trained.run("--resume").stdout) == [2]


@pytest.mark.parametrize("error", [NameError, ValueError, RuntimeError, KeyError, TypeError])
def test_an_error_of_the_readers_own_keeps_its_traceback(folder, command, monkeypatch, error):
    def broken(*_):
        raise error("an idea of mine")

    monkeypatch.setattr(train, "evaluate", broken)
    with pytest.raises(error, match="an idea of mine"):
        command()


@pytest.mark.parametrize("arguments, words", [
    (["--look", TEXT[100:113]], "13.*12"), (["--look", "7 π"], "'π'"), (["--sample", "π"], "'π'")])
def test_prompts_that_cannot_be_used(trained, command, arguments, words):
    assert re.search(words, refused(trained, command, *arguments))


def test_help(folder, command):
    output, status = command("--help")
    assert status in (0, None) and all(f"--{n}" in output for n in ("sample", "look", "resume"))


def test_an_mlx_that_is_too_old(monkeypatch):
    monkeypatch.setattr(mx, "array", object)  # which has no mT
    with pytest.raises(ImportError, match="too old"):
        module_from(SOURCE)
