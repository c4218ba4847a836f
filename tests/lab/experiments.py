"""Runs the experiments of README.md on edited copies of train.py.

    python tests/experiments.py                     all of them, seed 0
    python tests/experiments.py 2 9 --seeds 0 1     two of them, with two seeds each

Experiment 0 is train.py as it is. Prints the validation losses of each run. tests/MEASUREMENTS.md
has the results.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def apply_diff(source, diff):
    """The source with each run of - lines replaced by the + lines after it. Raises ValueError."""
    for removed, added in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)*)", diff, re.M):
        old = re.sub(r"^-", "", removed, flags=re.M)
        new = re.sub(r"^\+", "", added, flags=re.M)
        if source.count(old) != 1:
            raise ValueError(f"train.py does not contain once:\n{old}")
        source = source.replace(old, new)
    return source


def set_constants(source, lines):
    """The source with lines of Python put at the end of section 1. Raises ValueError."""
    mark = "# %% 2."
    if source.count(mark) != 1:
        raise ValueError(f"train.py has no single line that starts with {mark!r}")
    return source.replace(mark, lines + mark)


def experiments():
    """The experiments of the README that have an edit, by number: its language and its text."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## Experiments\n")[1].split("\n## ")[0]
    found = {}
    for part in section.split("\n### ")[1:]:
        block = re.search(r"^```(python|diff)\n(.*?)^```", part, re.M | re.S)
        if block:
            found[int(part.split(".")[0])] = block.groups()
    return found


def writes_text(block):
    """Whether this is the code of an experiment that makes its own input.txt."""
    return "input.txt" in block


def edited(source, language, block):
    """The source after an experiment's edit."""
    if language == "diff":
        return apply_diff(source, block)
    return set_constants(source, block)


def run(source, folder):
    """Runs a script in a folder, in which there is an input.txt. Returns what it printed."""
    Path(folder, "train.py").write_text(source, encoding="utf-8")
    result = subprocess.run([sys.executable, "train.py"], cwd=folder, check=True, text=True,
                            stdout=subprocess.PIPE, encoding="utf-8")
    return result.stdout


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("numbers", nargs="*", type=int, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    original = (ROOT / "train.py").read_text(encoding="utf-8")
    edits = {0: ("python", ""), **experiments()}
    for number in arguments.numbers or edits:
        language, block = edits[number]
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "input.txt").write_bytes((ROOT / "input.txt").read_bytes())
                source = original
                if writes_text(block):
                    subprocess.run([sys.executable, "-c", block], cwd=folder, check=True)
                else:
                    source = edited(source, language, block)
                output = run(set_constants(source, f"seed = {seed}\n"), folder)
            losses = ", ".join(re.findall(r"^Epoch .* val = (\S+)", output, re.M))
            print(f"experiment {number}, seed {seed}: {losses}", flush=True)
            print(output, file=sys.stderr)


if __name__ == "__main__":
    main()
