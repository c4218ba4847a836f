"""README.md, and the comments in train.py, against the code: what they say must be so."""

import ast
import io
import re
import tokenize

import pytest
import train
from conftest import ROOT, Folder
from test_run import EPOCH

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "train.py").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^# -{93}\n# (\d+\. .*)$", SOURCE, re.M)


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def names_of(source):
    """Every name that a piece of Python gives a value to, a function or a class included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)):
            names.add(getattr(node, "id", getattr(node, "attr", None)))
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


def lines_of_code(source):
    """Lines that are neither blank, nor comments, nor part of a docstring."""
    lines = {row for token in tokenize.generate_tokens(io.StringIO(source).readline)
             if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE,
                                   tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
             for row in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        if documented and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_length_and_width_of_the_script():
    lesson, conveniences = SOURCE.split("# 12. Conveniences")
    assert lines_of_code(lesson) <= 230
    assert lines_of_code(SOURCE) <= 400
    assert max(map(len, SOURCE.splitlines())) <= 100


def test_files_in_the_project():
    here = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    made = {"model.safetensors", "checkpoint.safetensors", "completions.txt", "training.log",
            "__pycache__"}
    assert here - made == {"train.py", "input.txt", "README.md", "requirements.txt", "tests"}
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"*.safetensors", "completions.txt", ".venv/"} <= set(ignored)
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists() or link.startswith("https://"), link


def test_sections_are_those_of_the_docstring_and_of_the_readme():
    assert [int(title.split(".")[0]) for title in SECTIONS] == list(range(1, 14))
    assert re.findall(r"^\| (\d+\. [^|]*?) \|", README, re.M) == SECTIONS
    summary = train.__doc__.replace("  ", " ")
    for title in SECTIONS:
        number, name = title.split(". ")
        assert re.search(rf"\b{number}\. {name.replace(' and ', '.*')}", summary), title
    order = [SOURCE.index(f"\n{what}") for what in (
        "ctx_len = ", "def load_text", "class CharTokenizer", "def get_batches",
        "class MultiHeadAttention", "class MLP", "class Block", "class GPT", "def loss_fn",
        "def train", "def generate", "def main")]
    assert order == sorted(order)


def test_all_that_the_readme_quotes_exists():
    known = names_of(SOURCE) | {"B", "T", "S", "val", "train"}
    for quoted in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", README):
        if re.fullmatch(r"[a-z]\w*(\.\w+)*", quoted) and not quoted.endswith((
                ".py", ".txt", ".safetensors", ".log", ".so", ".launch")):
            assert quoted.split(".")[-1] in known or quoted in ("g++", "python", "ssh"), quoted
        elif re.fullmatch(r"\w+ = \S+", quoted):
            assert quoted.split(" = ")[0] in known, quoted
        elif quoted.startswith("--"):
            assert f'"{quoted.split()[0]}"' in SOURCE, quoted


def test_commands_of_the_readme_are_those_of_the_script_and_of_ci():
    train_command, test_command = blocks("sh")[:2]
    assert train_command.endswith(" && .venv/bin/python train.py\n")
    assert test_command.endswith(" && .venv/bin/python -m pytest tests\n")
    ci = (ROOT / ".ci" / "run").read_text()
    assert "train=$(block 1)" in ci and "tests=$(block 2)" in ci and "pip install" not in ci
    options = {option for command in blocks("sh") for option in re.findall(r" (--[a-z]+)", command)
               if "train.py" in command.split(option)[0]}
    assert options == {"--resume", "--sample"}
    requirements = (ROOT / "requirements.txt").read_text()
    assert set(re.findall(r"^(mlx(?:\[cpu\])?|numpy)>=[\d.]+", requirements, re.M)) == {
        "mlx", "mlx[cpu]", "numpy"}
    assert len(requirements.splitlines()) == 3


def test_every_setting_is_explained():
    settings = SOURCE.split("# 2. Data\n")[0].split("# 1. Settings\n")[1]
    explained = set(re.findall(r"^(\w+) = \S.*? {1,}# \w.{15,}$", settings, re.M))
    saved = {*train.ARCHITECTURE, *train.TRAINING, *train.SAMPLING}
    assert explained == saved


def test_default_settings_are_those_of_the_article():
    values = dict(re.findall(r"^(\w+) = (\S+)", SOURCE.split("if mx.default_device()")[0], re.M))
    for name, value in dict(ctx_len=128, n_emb=128, n_heads=4, n_layers=3, num_epochs=20).items():
        assert values[name] == str(value)


def test_public_functions_have_docstrings():
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
            assert ast.get_docstring(node), node.name


def test_lines_of_a_forward_pass_carry_their_shapes():
    forward = [node for node in ast.walk(ast.parse(SOURCE))
               if isinstance(node, ast.FunctionDef) and node.name == "__call__"]
    lines = [line for node in forward
             for line in SOURCE.splitlines()[node.lineno - 1 : node.end_lineno]]
    changing = [line for line in lines
                if re.search(r"split_heads\(self|concatenate|transpose\(0, [12], [13], [23]\)| @ v|"
                             r"c_fc\(|\.c_proj\(|wte\(|lm_head\(", line)]
    assert len(changing) == 14
    assert all(re.search(r"# .*\(.*(B|T).*\)", line) for line in changing), changing


def test_worked_numbers_in_the_readme():
    for number in re.findall(r"\b627,\d{3}\b", README + SOURCE):
        assert number == "627,009"  # counted in test_model
    assert "8,320" in README and 65 * 128 == 8320


# The experiments: their edits, applied to a copy, must still fit and still run.


def experiments():
    section = README.split("\n## Experiments\n")[1].split("\n## ")[0]
    parts = re.split(r"^### (\d+\. .*)$", section, flags=re.M)[1:]
    return list(zip(parts[::2], parts[1::2]))


def apply(part):
    """The settings and the source that an experiment asks for."""
    settings = {}
    for block in re.findall(r"^```python\n(.*?)^```", part, re.M | re.S):
        exec(block, {name: getattr(train, name) for name in train.TRAINING}, settings)
    source = SOURCE
    for block in re.findall(r"^```diff\n(.*?)^```", part, re.M | re.S):
        for old, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)*)", block, re.M):
            old, new = (re.sub(r"^[-+]", "", text, flags=re.M) for text in (old, new))
            assert source.count(old) == 1, old
            source = source.replace(old, new)
    assert settings or source != SOURCE
    return settings, source


def test_experiments_are_questions_with_answers():
    found = experiments()
    assert len(found) >= 10
    assert sum(bool(re.search(r"Measured.*\d\.\d\d", part, re.S)) for _, part in found) >= 6
    for number, (title, part) in enumerate(found, 1):
        assert title.startswith(f"{number}. ") and title.endswith("?")
        assert part.count("<details>") == part.count("</details>") == 1
        settings, _ = apply(part)
        assert set(settings) <= {*train.ARCHITECTURE, *train.TRAINING, *train.SAMPLING}


@pytest.mark.parametrize("title, part", experiments(), ids=lambda value: value[:12])
def test_experiments_run(tmp_path, title, part):
    settings, source = apply(part)
    fitting = {**settings, "ctx_len": 8, "num_epochs": 1, "batch_size": 4, "max_new_tokens": 10}
    fitting["n_emb"] = 16
    folder = Folder(tmp_path, source=source, **fitting)
    result = folder.run()
    assert result.returncode == 0, result.stderr
    assert len(EPOCH.findall(result.stdout)) == 1
