"""The README: its edits apply and run, its code works, its figures appear in MEASUREMENTS.md."""

import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import types

import experiments
import mlx.core as mx
import numpy as np
import pytest
import reference
import train
from conftest import ROOT, SOURCE, TEXT, TINY, agrees, with_settings

README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASUREMENTS = (ROOT / "tests" / "MEASUREMENTS.md").read_text(encoding="utf-8")
EXPERIMENTS = experiments.experiments()
EDITS = {number: edit for number, edit in EXPERIMENTS.items()
         if not experiments.writes_text(edit[1])}


def section(title, text=README):
    return text.split(f"\n## {title}")[1].split("\n## ")[0]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def skip_if_edited():
    """A reader's own train.py need not fit the README any more."""
    try:
        subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "train.py"], cwd=ROOT, check=True,
                       capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("train.py was edited, or this is no git checkout")


def after_experiment(source, number):
    """The source after the edit of an experiment."""
    try:
        return experiments.edited(source, *EDITS[number])
    except ValueError:
        skip_if_edited()
        raise


def import_file(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("number", EDITS)
def test_an_experiment_applies_trains_and_can_be_looked_at(number, tmp_path, monkeypatch, capsys):
    source = after_experiment(with_settings(SOURCE, **TINY), number)
    (tmp_path / "edited.py").write_text(source, encoding="utf-8")
    (tmp_path / "input.txt").write_text(TEXT * 8, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    module = import_file("edited.py", f"edited_{number}")
    module.num_epochs = 1
    module.train()
    module.look("3 sheep")
    shown = capsys.readouterr().out
    assert "Epoch  0 | train = " in shown
    assert shown.count("\nblock 0, head ") == module.n_heads


@pytest.mark.parametrize("numbers", [[1, 3, 6, 7, 8, 9, 11, 12], [2, 4, 5, 10]])
def test_pytest_collects_after_the_edits(numbers, tmp_path):
    source = SOURCE
    for number in numbers:
        source = after_experiment(source, number)
    (tmp_path / "train.py").write_text(source, encoding="utf-8")
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    result = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", "tests"],
                            cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_sums(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [block] = filter(experiments.writes_text, blocks(section("Experiments"), "python"))
    exec(block, {})
    lines = (tmp_path / "input.txt").read_text().splitlines()
    assert lines[301] == "1 + 1 = 2" and len(lines) == 90_000


def test_settings_in_the_readme_are_settings():
    found = [re.findall(r"^(\w+) = ([\d.e-]+)$", block, re.M) for block in blocks(README, "python")]
    assert max(map(len, found)) == 6  # those of the larger model
    for name, value in itertools.chain(*found):
        kind, smallest, below = train.LIMITS[name]
        assert smallest <= kind(value) < below


def openai_file(path):
    """Writes random weights in OpenAI's layout. Returns them in train.py's names."""
    ctx_len = 10
    weights = reference.random_weights(11, ctx_len, n_emb=24, n_layers=2)
    arrays = {}
    for name, weight in weights.items():
        theirs = name.replace("blocks.", "h.").replace(".mha.", ".attn.")
        matrix_in_block = name.startswith("blocks.") and weight.ndim == 2
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            parts = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            weight = np.concatenate(parts)
            theirs = theirs.replace("q_proj", "c_attn")
        arrays[theirs] = mx.array(weight.T if matrix_in_block else weight)
    arrays["h.0.attn.bias"] = mx.ones((1, 1, ctx_len, ctx_len))  # their mask, no parameter
    mx.save_safetensors(str(path), arrays)
    return weights


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """The README's gpt2.py as a module, with a tokenizer that needs no download."""
    fake = types.ModuleType("tiktoken")
    fake.get_encoding = lambda name: types.SimpleNamespace(
        encode=lambda text: [ord(char) % 11 for char in text][:5],
        decode=lambda tokens: "".join(f"<{token}>" for token in tokens))
    monkeypatch.setitem(sys.modules, "tiktoken", fake)
    monkeypatch.chdir(tmp_path)
    [block] = [b for b in blocks(section("The model is GPT-2"), "python") if "load_gpt2" in b]
    (tmp_path / "gpt2.py").write_text(block, encoding="utf-8")
    return import_file("gpt2.py", "gpt2")


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_openais_weights_give_gpt_2s_logits(gpt2, tmp_path, prefix):
    weights = openai_file(tmp_path / "gpt2.safetensors")
    arrays = mx.load("gpt2.safetensors")
    mx.save_safetensors("named.safetensors", {prefix + name: a for name, a in arrays.items()})
    model = gpt2.load_gpt2("named.safetensors")
    tokens = np.random.default_rng(0).integers(0, 11, (2, 10))
    wanted = reference.forward(weights, tokens, n_heads=12)
    assert np.abs(np.array(model(mx.array(tokens))) - wanted).max() < 2e-5


@pytest.mark.parametrize("name", ["wte.weight", "h.1.mlp.c_fc.bias", "ln_f.weight"])
def test_a_file_that_is_not_gpt_2(gpt2, tmp_path, name):
    openai_file(tmp_path / "gpt2.safetensors")
    arrays = mx.load("gpt2.safetensors")
    del arrays[name]
    mx.save_safetensors("lacks.safetensors", arrays)
    with pytest.raises(ValueError, match=name.split(".")[-2]):
        gpt2.load_gpt2("lacks.safetensors")


def test_the_program_that_lets_gpt_2_write(gpt2, tmp_path, capsys):
    openai_file(tmp_path / "gpt2.safetensors")
    source = (tmp_path / "gpt2.py").read_text(encoding="utf-8")
    exec(compile(source, "gpt2.py", "exec"), {"__name__": "__main__"})
    assert re.fullmatch(r"(<\d+>){100}", capsys.readouterr().out)


def losses_in(text, digits):
    """The numbers in a text that look like losses, with so many digits after the point."""
    return re.findall(rf"(?<![\d.])\d\.\d{{{digits}}}(?!\.?\d)", text)


def can_come_from(figure, losses):
    """Whether a figure is one of these losses, rounded."""
    places = len(figure.split(".")[1])
    return any(agrees(float(loss), float(figure), places) for loss in losses)


def test_figures_appear_in_measurements():
    noted = re.findall(r"\d+\.\d+", MEASUREMENTS.replace(",", " "))
    figures = losses_in(README, digits="3,4")
    assert len(figures) > 20
    for figure in figures:
        assert can_come_from(figure, noted), figure


def measured(title, *row):
    """The losses after each epoch in MEASUREMENTS.md: in this section, the row with these cells."""
    lines = section(title, MEASUREMENTS).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    [found] = [each[-1] for each in cells if each[:-1] == list(row)]
    return found.split(", ")


def test_the_chart_shows_the_default_model():
    chart = re.search(r"^ +line \[(.*)\]$", README, re.M)[1].split(", ")
    losses = measured("Losses", "default", "shipped", "0")
    assert all(can_come_from(shown, [loss]) for shown, loss in zip(chart, losses, strict=True))


def test_the_answers_have_the_losses_of_their_experiments():
    rows = re.findall(r"^\| (\d+) \| .* \| \d \| ([\d., ]+) \|$",
                      section("Experiments", MEASUREMENTS), re.M)
    base = [measured("Losses", "small", "shipped", seed)[-1] for seed in "012"]
    for experiment in section("Experiments").split("\n### ")[1:]:
        number, answer = experiment.split(".")[0], experiment.split("</summary>")[1]
        runs = [losses.split(", ") for n, losses in rows if n == number]
        figures = losses_in(re.sub(r"^```.*?^```", "", answer, flags=re.M | re.S), digits="2,3")
        assert (runs != []) == (int(number) in EXPERIMENTS)
        for figure in figures:
            assert can_come_from(figure, [*base, *itertools.chain(*runs)]), answer
        for losses in runs:  # the last one of each run is in the answer
            assert any(can_come_from(figure, [losses[-1]]) for figure in figures), answer


def test_the_header_of_the_script_asks_for_what_requirements_txt_asks_for():
    header = re.search(r"^# dependencies = \[(.*?)\]$", SOURCE, re.M | re.S)
    if not header:
        pytest.skip("train.py has no list of dependencies")
    wanted = (ROOT / "requirements.txt").read_text(encoding="utf-8").replace('"', "'").splitlines()
    assert sorted(re.findall(r'"(.*?)"', header[1])) == sorted(wanted)


def test_links_lead_to_the_sections():
    titles = {line.removeprefix("# %% "): str(number)
              for number, line in enumerate(SOURCE.splitlines(), 1) if line.startswith("# %% ")}
    links = dict(re.findall(r"\[(\d+\. [^]]+)\]\(train\.py#L(\d+)\)", README))
    if links != titles:
        skip_if_edited()
    assert links == titles
