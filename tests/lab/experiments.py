"""Runs the experiments of README.md, its ladder, or its larger edits, on copies of train.py.

    python tests/lab/experiments.py                       all experiments, seed 0
    python tests/lab/experiments.py 3 8 --seeds 0 1       two of them, with two seeds each
    python tests/lab/experiments.py --ladder              "From GPT-2 to the models of today"
    python tests/lab/experiments.py --ladder 5 --default  its fifth step, with the default model
    python tests/lab/experiments.py --larger 3            the third of the "Larger edits"

Number 0 is train.py as it is. Prints the validation losses of each run. tests/lab/MEASUREMENTS.md
has the results.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def apply_diff(source, diff):
    """The source after a diff, whose hunks begin with lines of @@. Raises ValueError.

    The lines of a hunk that begin with a space or a minus must stand together in the source, once.
    """
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M):
        lines = [line for line in hunk.splitlines(keepends=True) if line.strip()]
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        if lines and source.count("\n" + old) != 1:
            raise ValueError(f"train.py does not contain once:\n{old}")
        source = source.replace("\n" + old, "\n" + new)
    return source


def forced(source, small):
    """The source with the settings of the small model, or of the default one. Raises ValueError."""
    source, n = re.subn(r"^small = .*", f"small = {small}", source, flags=re.M)
    if n != 1:
        raise ValueError(f"train.py sets small in {n} lines")
    return source


def set_constants(source, lines):
    """The source with lines of Python put at the end of section 1. Raises ValueError."""
    mark = "# %% 2."
    if source.count(mark) != 1:
        raise ValueError(f"train.py has no single line that starts with {mark!r}")
    return source.replace(mark, lines + mark)


def blocks(title):
    """The edits in a section of the README: by number, the language and the text of its block."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = {}
    for part in section.split("\n### ")[1:]:
        block = re.search(r"^```(python|diff)\n(.*?)^```", part, re.M | re.S)
        if block:
            found[int(part.split(".")[0])] = block.groups()
    return found


def experiments():
    return blocks("Experiments")


def writes_text(block):
    """Whether this is the code of an experiment that makes its own input.txt."""
    return "input.txt" in block


def edited(source, language, block):
    """The source after an experiment's edit."""
    if language == "diff":
        return apply_diff(source, block)
    return set_constants(source, block)


def ladder(source):
    """The source, and what becomes of it by each step of the ladder after those before it."""
    steps = [source]
    for _, (_, diff) in sorted(blocks("From GPT-2 to the models of today").items()):
        steps.append(apply_diff(steps[-1], diff))
    return steps


def larger(source):
    """The source, by number, after each of the larger edits that are diffs."""
    return {number: apply_diff(source, block)
            for number, (language, block) in blocks("Larger edits").items() if language == "diff"}


def run(source, text, title):
    """Trains by a script on a text, and prints the validation losses. The rest goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.py").write_text(source, encoding="utf-8")
        Path(folder, "input.txt").write_text(text, encoding="utf-8")
        result = subprocess.run([sys.executable, "train.py"], cwd=folder, check=True, text=True,
                                stdout=subprocess.PIPE, encoding="utf-8")
    losses = ", ".join(re.findall(r"^Epoch .* val = (\S+)", result.stdout, re.M))
    print(f"{title}: {losses}", flush=True)
    print(result.stdout, file=sys.stderr)


def text_of(block):
    """The text that an experiment's code writes."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", block], cwd=folder, check=True)
        return Path(folder, "input.txt").read_text(encoding="utf-8")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("numbers", nargs="*", type=int, help="without any: all")
    parser.add_argument("--ladder", action="store_true")
    parser.add_argument("--larger", action="store_true")
    parser.add_argument("--default", action="store_true", help="the default model")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    original = (ROOT / "train.py").read_text(encoding="utf-8")
    if arguments.default:
        original = forced(original, small=False)
    shipped = (ROOT / "input.txt").read_text(encoding="utf-8")
    if arguments.ladder:
        runs = {number: (source, shipped) for number, source in enumerate(ladder(original))}
    elif arguments.larger:
        sources = {0: original, **larger(original)}
        runs = {number: (source, shipped) for number, source in sources.items()}
    else:
        runs = {0: (original, shipped)}
        for number, (language, block) in experiments().items():
            if writes_text(block):
                runs[number] = (original, text_of(block))
            else:
                runs[number] = (edited(original, language, block), shipped)
    for number in arguments.numbers or runs:
        source, text = runs[number]
        for seed in arguments.seeds:
            run(set_constants(source, f"seed = {seed}\n"), text, f"{number}, seed {seed}")


if __name__ == "__main__":
    main()
