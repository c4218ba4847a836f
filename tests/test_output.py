"""Output: pipes, terminals, and what stands in for them."""

import io
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import epochs, run_log, unix


@unix
@pytest.mark.parametrize("arguments", [[], ["--sample", "7"]])
def test_a_pipe_whose_reader_has_left(trained, arguments):
    reading, writing = os.pipe()
    os.close(reading)
    result = trained.run(*arguments, capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr


def test_control_characters_and_a_pipe_of_few_characters(folder):
    folder.write("input.txt", "\x1b\x07a\n" * 300)
    ascii = dict(variables={"PYTHONIOENCODING": "ascii"}, encoding="ascii")
    result = folder.run(**ascii)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    text = folder.read("completions.txt").decode()
    shown = result.stdout[: result.stdout.rindex(text)]
    assert "\x1b" in text and epochs(shown) == [0, 1]
    look = folder.run("--look", "\x1b\x07a\n", **ascii)
    assert look.returncode == 0 and not {"\x1b", "\x07"} & set(shown + look.stdout)


@pytest.mark.parametrize("stdout", ["nothing", "only write and flush"])
def test_no_terminal_at_all(folder, command, monkeypatch, stdout):
    """As under pythonw, and as in IDLE."""
    shown = []
    writer = SimpleNamespace(write=shown.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", None if stdout == "nothing" else writer)
    assert command()[1] == 0 and len(run_log(folder)) == 1
    assert epochs("".join(shown)) == ([] if stdout == "nothing" else [0, 1])


@pytest.mark.parametrize("width", [12, 150])
def test_progress_takes_one_row(folder, tiny, command, steps, monkeypatch, width):
    tiny(num_epochs=5)  # so that it takes over ten minutes, and the lines become shorter
    steps.seconds = 14
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    assert command()[1] == 0
    rows = [row.split("\r") for row in terminal.getvalue().split("\n")]
    passing = [part for row in rows for part in row[:-1]]
    assert len(passing) == len(steps.rows) - 1
    assert all(part.startswith("step ") and len(part) < width for part in passing)
    assert epochs("\n".join(row[-1] for row in rows)) == list(range(5))
    for row in rows:
        for old, new in itertools.pairwise(row):  # nothing is left of what was there before
            assert old[len(new) :].strip() == "", row
