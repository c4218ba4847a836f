"""README.md, MEASUREMENTS.md and the head of train.py, against the code: what they say must be so."""

import ast
import re

import pytest
import train
from conftest import ROOT, Folder
from test_model import count
from test_run import EPOCH

README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOK = (ROOT / "tests" / "MEASUREMENTS.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "train.py").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^# -{93}\n# (\d+\. .*)$", SOURCE, re.M)


def section(title):
    """The text of README under a heading."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks_of(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def names_of(source):
    """Every name that a piece of Python uses or gives a value to."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        names |= {getattr(node, kind) for kind in ("name", "id", "attr", "arg") if hasattr(node, kind)}
    return names


def test_files_of_the_project():
    for file in ("train.py", "input.txt", "README.md", "requirements.txt", "tests/MEASUREMENTS.md"):
        assert (ROOT / file).is_file(), file
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"*.safetensors", "completions.txt", "tmp-*", ".venv/"} <= set(ignored)
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists() or link.startswith("https://"), link
    for name in re.findall(r"\]\[(\w+)\]", README):  # [text][name] needs [name]: address
        assert re.search(rf"^\[{name}\]: \S+$", README, re.M), name


def test_sections_are_those_of_the_docstring_and_of_the_readme():
    assert [int(title.split(".")[0]) for title in SECTIONS] == list(range(1, len(SECTIONS) + 1))
    assert re.findall(r"^\| (\d+\. [^|]*?) \|", README, re.M) == SECTIONS
    for title in SECTIONS:
        assert title in train.__doc__, title
    order = [SOURCE.index(f"\n{what}") for what in (
        "ctx_len = ", "def load_text", "class CharTokenizer", "def get_batches", "def loss_fn",
        "class MultiHeadAttention", "class MLP", "class Block", "class GPT", "def train",
        "def generate", "def main")]
    assert order == sorted(order)


def test_all_that_the_readme_quotes_exists():
    known = names_of(SOURCE) | {"val", "train", "small"}
    for quoted in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", README, flags=re.S)):
        if re.fullmatch(r"\w+ = \S+", quoted):
            assert quoted.split(" = ")[0] in known, quoted
        elif quoted.startswith("--") and quoted not in ("--hosts 10.0.0.1,10.0.0.2",):
            assert f'"{quoted.split()[0]}"' in SOURCE, quoted
        elif re.fullmatch(r"[a-z]+_[a-z_]+(\.\w+)*", quoted):
            assert quoted.split(".")[-1] in known, quoted


def test_commands_of_the_readme_are_those_of_the_script_and_of_ci():
    train_command, test_command = blocks_of(README, "sh")[:2]
    assert train_command.endswith(" && .venv/bin/python train.py\n")
    assert test_command.endswith(" && .venv/bin/python -m pytest tests\n")
    ci = (ROOT / ".ci" / "run").read_text()
    assert "train=$(block 1)" in ci and "tests=$(block 2)" in ci and "pip install" not in ci
    options = {option for command in blocks_of(README, "sh") for option in
               re.findall(r" (--[a-z]+)", command) if "train.py" in command.split(option)[0]}
    assert options == set(re.findall(r'"(--[a-z]+)"', SOURCE))


def test_requirements_and_the_script_head_name_a_backend_for_every_system():
    needs = set((ROOT / "requirements.txt").read_text().replace('"', "'").splitlines())
    version = next(need for need in needs if need.startswith("mlx>=")).removeprefix("mlx")
    assert needs - {f"mlx{version}", f"mlx[cpu]{version}; sys_platform == 'linux'",
                    f"mlx-cpu{version}; sys_platform == 'win32'"} == {"numpy>=1.26.4"}
    head = SOURCE.split("# /// script\n")[1].split("# ///\n")[0].replace("# ", "")
    assert set(ast.literal_eval(head.split("dependencies = ")[1])) == needs
    assert 'requires-python = ">=3.10"' in head and "Python 3.10" in README


def test_nothing_in_the_script_exists_on_unix_only():
    used = {f"{node.value.id}.{node.attr}" for node in ast.walk(ast.parse(SOURCE))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    unix = {"signal.SIGPIPE", "signal.SIGALRM", "signal.pthread_sigmask", "os.fork", "os.geteuid",
            "os.getpgid", "os.killpg", "os.uname"}
    assert not used & unix
    assert not names_of(SOURCE) & {"fcntl", "pty", "resource", "termios", "pwd"}


def test_every_setting_is_explained():
    settings = SOURCE.split("# 2. Data\n")[0].split("# 1. Settings\n")[1]
    explained = set(re.findall(r"^(\w+) = \S.*? {1,}# \w.{12,}$", settings, re.M))
    assert explained >= {*train.SETTINGS, "small"}


def test_public_functions_have_docstrings():
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
            assert ast.get_docstring(node), node.name


def test_figures_of_the_readme_stand_in_the_notebook():
    """Every loss in README, of four digits or in the answer to an experiment."""
    losses = set(re.findall(r"\b[0-4]\.\d{3,4}\b", section("What a loss is worth")
                            + section("Experiments")))
    assert len(losses) > 25
    assert not {loss for loss in losses if loss not in NOTEBOOK}
    for number in re.findall(r"\b627,\d{3}\b", README + SOURCE + NOTEBOOK):
        assert number == "627,009"  # counted in test_model


def test_the_larger_model_has_the_parameters_told():
    (lines,) = blocks_of(section("What a loss is worth"), "python")
    larger = {}
    exec(lines, larger)
    assert set(larger) - {"__builtins__"} <= set(train.SETTINGS)
    parameters = count(65, 128, larger["n_emb"], larger["n_layers"])  # 128: the default context
    assert f"| **larger** | {parameters:,} |" in README and f"| {parameters:,} |" in NOTEBOOK
    assert larger["n_emb"] % larger["n_heads"] == 0 and parameters < 5e6


def test_differences_from_gpt2_are_those_of_the_diff():
    diff = blocks_of(section("From here to GPT-2"), "diff")[0]
    assert "bias=False" in diff and "gelu_approx" in diff and "lm_head" in diff
    head = SOURCE.split("# 8. GPT\n")[1].split("class GPT")[0]
    text = " ".join(head.replace("#", "").split())
    for words in ("queries, keys and values have biases", "with tanh", "wte once more"):
        assert words in text, words


# The experiments: their edits, applied to a copy, must still fit and still run.


def experiments():
    parts = re.split(r"^### (\d+\. .*)$", section("Experiments"), flags=re.M)[1:]
    return list(zip(parts[::2], parts[1::2]))


def apply(part):
    """The settings and the source that an experiment asks for."""
    settings = {}
    for block in blocks_of(part, "python"):
        if re.fullmatch(rf"(({'|'.join(train.SETTINGS)}) = .*\n)+", block):
            exec(block, {name: getattr(train, name) for name in train.SETTINGS}, settings)
    source = SOURCE
    for block in blocks_of(part, "diff"):
        for old, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)*)", block, re.M):
            old, new = (re.sub(r"^[-+]", "", text, flags=re.M) for text in (old, new))
            assert source.count(old) == 1, old
            source = source.replace(old, new)
    return settings, source


def test_experiments_are_questions_with_answers():
    found = experiments()
    assert len(found) >= 12
    for number, (title, part) in enumerate(found, 1):
        assert title.startswith(f"{number}. ") and title.endswith("?")
        assert part.count("<details>") == part.count("</details>") == 1
        assert set(apply(part)[0]) <= set(train.SETTINGS)
    assert sum(bool(re.search(r"\d\.\d{3}", part)) for _, part in found) >= 12


@pytest.mark.parametrize("title, part", [e for e in experiments() if apply(e[1]) != ({}, SOURCE)],
                         ids=lambda value: value[:12])
def test_experiments_run(tmp_path, title, part):
    settings, source = apply(part)
    fitting = {**settings, "ctx_len": 8, "num_epochs": 1, "batch_size": 4, "max_new_tokens": 10}
    fitting["n_emb"] = 16
    folder = Folder(tmp_path, source=source, **fitting)
    result = folder.run()
    assert result.returncode == 0, result.stderr
    assert len(EPOCH.findall(result.stdout)) == 1
