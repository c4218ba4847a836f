"""The README: its edits apply and run, its code works, its figures are those of MEASUREMENTS.md."""

import itertools
import math
import re
import sys
import types

import benchmark
import experiments
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
import reference
import train
from helpers import (ROOT, SOURCE, TINY, agrees, applied, edited, epochs, forced, missing,
                     module_from, named, noting_steps, random_tokens, refused, run_log,
                     with_settings)
from mlx.utils import tree_flatten

README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASUREMENTS = (ROOT / "tests" / "lab" / "MEASUREMENTS.md").read_text(encoding="utf-8")
EXPERIMENTS = experiments.experiments()
EDITS = [number for number, (_, block) in EXPERIMENTS.items() if not experiments.writes_text(block)]
LADDER = "From GPT-2 to the models of today"


def section(title, text=README):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def block_after(marker):
    """The code in the block below an HTML comment."""
    return re.search(rf"^<!-- {re.escape(marker)} -->\n```\w+\n(.*?)^```", README, re.M | re.S)[1]


# Edits


@pytest.mark.parametrize("number", EDITS)
def test_an_experiment_applies_and_trains(number, folder, command):
    source = with_settings(SOURCE, **{**TINY, "num_epochs": 1})
    source = applied(experiments.edited, source, *EXPERIMENTS[number])
    output, _ = command(module=module_from(source))
    assert epochs(output) == [0]
    asked = EXPERIMENTS[number][1]
    assert ("sees the future" in output) == ("causal_mask" in asked)  # the experiment about it


def test_the_sums():
    [block] = [block for _, block in EXPERIMENTS.values() if experiments.writes_text(block)]
    lines = experiments.text_of(block).splitlines()
    assert lines[301] == "1 + 1 = 2" and len(lines) == 90_000


@pytest.fixture(scope="module")
def steps():
    """The sources of the ladder in tiny settings, from GPT-2 on."""
    return applied(experiments.ladder, with_settings(SOURCE, **TINY))


@pytest.mark.parametrize("number", range(1, 7))
def test_a_step_of_the_ladder(number, steps, folder, command):
    module, before = module_from(steps[number], "step"), module_from(steps[number - 1], "before")
    output, _ = command(module=module)
    assert epochs(output) == [0, 1] and "sees the future" not in output
    assert "\nblock 0, head 1" in command("--look", "7 sheep", module=module)[0]

    model, _ = module.load_model(module.MODEL)
    tokens = mx.array(random_tokens(2, 12))
    whole, caches = model(tokens), [module.KVCache() for _ in model.blocks]
    parts = [model(tokens[:, start:end], caches) for start, end in ((0, 4), (4, 5), (5, 12))]
    assert mx.abs(mx.concatenate(parts, axis=1) - whole).max().item() < 1e-4

    if number == 5:  # without the new size, the model is that of older files
        old = benchmark.new_model(before)
        new = module.GPT(module.GPTConfig(**vars(old.config)))
        assert module.shapes(new.parameters()) == module.shapes(old.parameters())

    before.num_epochs = module.num_epochs = 3
    assert "parameters" in refused(folder, command, "--resume", module=before) or number == 6
    if number < 6:  # the last step changes only the optimizer
        assert "does not match" in refused(folder, command, "--sample", module=before)
    assert epochs(command("--resume", module=module)[0]) == [2]


@pytest.fixture
def larger():
    """The sources after the larger edits, in tiny settings."""
    return applied(experiments.larger, with_settings(SOURCE, **TINY))


def test_losses_and_weights_every_500_steps(larger, folder, command, monkeypatch):
    source = edited(larger[1], (r"progress\.step % 500", "progress.step % 5"))
    module = module_from(with_settings(source, dropout=0.5))
    steps = []

    def note(model, *_):
        steps.append((model.training, *mx.random.state[0].tolist()))

    monkeypatch.setattr(module, "make_step", noting_steps(module.make_step, note))
    output, _ = command(module=module)
    assert epochs(output) == [0, 1]
    looks = re.findall(r"^Step (\d+) \| train = (\S+) \| val = (\S+) \|", output, re.M)
    assert [int(n) for n, *_ in looks] == list(range(5, len(steps) + 1, 5))
    assert all(training for training, *_ in steps)
    assert len(set(steps)) == len(steps)  # dropout never gets the same random numbers again
    model, tokenizer = module.load_model("step-5.safetensors")
    train_tokens, val_tokens = module.split(np.array(tokenizer.encode(module.load_text())))
    texts = train_tokens[: len(val_tokens)], val_tokens
    assert tuple(f"{module.evaluate(model, text):.4f}" for text in texts) == looks[0][1:]


def descended(source, rate=1.0):
    """The loss of a step of plain gradient descent, and by how much it moves the weights."""
    module = module_from(source)
    module.max_norm = 1e9
    model = benchmark.new_model(module)
    before, optimizer = named(model.parameters()), optim.SGD(rate)
    optimizer.init(model.trainable_parameters())
    rows = mx.array(random_tokens(8, 13))
    loss = module.make_step(model, optimizer)(rows[:, :-1], rows[:, 1:])
    moves = {name: after - before[name] for name, after in named(model.parameters()).items()}
    return loss, moves


@pytest.mark.parametrize("number, least, most", [(2, 0, 1e-5), (3, 1e-4, 3e-2)])
def test_a_larger_edit_finds_the_same_gradient(number, least, most, larger, folder, command, watch):
    assert epochs(command(module=module_from(larger[number]))[0]) == [0, 1]
    clipped = watch(optim, "clip_grad_norm")
    loss, moves = descended(larger[number])
    assert {array.dtype for _, array in tree_flatten([loss, clipped[0][0]])} == {mx.float32}
    wanted_loss, wanted = descended(with_settings(SOURCE, **TINY))
    error = sum(np.sum((moves[name] - wanted[name])**2) for name in wanted)
    error = math.sqrt(error / sum(np.sum(move**2) for move in wanted.values()))
    assert abs(loss - wanted_loss).item() < most and least <= error < most
    _, moves = descended(larger[number], rate=0.0)
    assert not any(np.any(move) for move in moves.values())  # not even by rounding


def test_several_learning_rates(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "train", module_from(with_settings(SOURCE, **TINY)))
    exec(compile(block_after("sweep.py"), "sweep.py", "exec"), {})
    shown = re.findall(r"^lr = (\S+): (\S+)$", capsys.readouterr().out, re.M)
    runs = run_log(folder)
    assert shown == [(str(run["settings"]["lr"]), f"{run['history'][-1]['val']:.4f}")
                     for run in runs] and len({loss for _, loss in shown}) == 3
    assert all((folder.path / f"lr-{rate}.safetensors").is_file() for rate, _ in shown)


def test_settings_in_the_readme_are_settings(monkeypatch):
    blocks = re.findall(r"^```python\n((?:\w+ = [\d.e-]+\n)+)```", README, re.M)
    assert len(blocks) >= 5
    for name, value in itertools.chain(*(re.findall(r"(\w+) = (.+)", block) for block in blocks)):
        if name not in train.SETTINGS:
            missing(f"{name} is no setting")
        monkeypatch.setattr(train, name, float(value))
    train.check_settings(train.SETTINGS)


# GPT-2's weights

WEIGHTS = reference.random_weights(11, ctx_len=10, n_emb=24, n_layers=2)


def in_openais_layout(weights):
    """Weights in train.py's names, in the names and shapes of OpenAI's file."""
    arrays = {}
    for name, weight in weights.items():
        theirs = name.replace("blocks.", "h.").replace("q_proj", "c_attn")
        if ".q_proj." in name:
            parts = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            weight = np.concatenate(parts)
        if ".k_proj." not in name and ".v_proj." not in name:
            is_matrix = name.startswith("blocks.") and weight.ndim == 2
            arrays[theirs] = mx.array(weight.T if is_matrix else weight)
    return arrays


@pytest.fixture
def gpt2(folder, monkeypatch):
    """The README's gpt2.py as a module, with a tokenizer that needs no download."""
    fake = types.ModuleType("tiktoken")
    fake.get_encoding = lambda name: types.SimpleNamespace(
        encode=lambda text: [ord(char) % 11 for char in text][:5],
        decode=lambda tokens: "".join(f"<{token}>" for token in tokens))
    monkeypatch.setitem(sys.modules, "tiktoken", fake)
    return module_from(block_after("gpt2.py"), "gpt2")


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_openais_weights_give_gpt_2s_logits_and_write(gpt2, capsys, prefix):
    arrays = {prefix + name: array for name, array in in_openais_layout(WEIGHTS).items()}
    arrays[prefix + "h.0.attn.bias"] = mx.ones((1, 1, 10, 10))  # their mask, no parameter
    mx.save_safetensors("gpt2.safetensors", arrays)
    model = gpt2.load_gpt2("gpt2.safetensors")
    tokens = random_tokens(2, 10)
    wanted = reference.forward(WEIGHTS, tokens, n_heads=12)
    assert np.abs(np.array(model(mx.array(tokens))) - wanted).max() < 2e-5
    exec(compile(block_after("gpt2.py"), "gpt2.py", "exec"), {"__name__": "__main__"})
    assert re.fullmatch(r"Once upon a time(<\d+>){100}", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["wte.weight", "h.1.mlp.c_fc.bias", "ln_f.weight"])
def test_a_file_that_is_not_gpt_2(gpt2, name):
    arrays = in_openais_layout(WEIGHTS)
    del arrays[name]
    mx.save_safetensors("lacks.safetensors", arrays)
    with pytest.raises(ValueError, match=name.split(".")[-2]):
        gpt2.load_gpt2("lacks.safetensors")


def test_the_way_back(trained):
    exec(compile(block_after("export.py"), "export.py", "exec"), {})
    written = trained.arrays("my-gpt2/model.safetensors")
    wanted = in_openais_layout(trained.arrays())
    assert written.keys() == wanted.keys()
    assert all(np.array_equal(written[name], wanted[name]) for name in wanted)


# Figures


def measured(title, *row):
    """The row of MEASUREMENTS.md that begins with these, in this section."""
    lines = section(title, MEASUREMENTS).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    [found] = [each for each in cells if each[: len(row)] == list(row)]
    return found


def each_epoch(title, *row):
    """The losses in such a row."""
    return measured(title, *row)[-1].split(", ")


def last(title, *row):
    """The loss after the last epoch in such a row."""
    return each_epoch(title, *row)[-1]


def can_come_from(figure, losses):
    """Whether a figure is one of these numbers, rounded."""
    places = len(figure.partition(".")[2])
    return any(agrees(float(loss), float(figure), places) for loss in losses)


def losses_in(text):
    """The numbers in a text that look like losses."""
    return re.findall(r"(?<![\d.])\d\.\d{2,4}(?!\.?\d)", text)


def rows_of(title):
    """The tables in a section of the README, by the first cell: the other cells of each row."""
    rows = [[cell.replace("*", "").strip() for cell in line.split("|")[1:-1]]
            for line in section(title).splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_the_chart_shows_the_default_model():
    chart = re.search(r"^ +line \[(.*)\]$", README, re.M)[1].split(", ")
    losses = each_epoch("Losses", "default", "shipped", "0")
    assert all(can_come_from(shown, [loss]) for shown, loss in zip(chart, losses, strict=True))


def test_the_table_of_losses():
    rows = rows_of("What a loss is worth")
    for model in ("small", "default"):
        _, shipped, tiny = rows[model]
        assert can_come_from(shipped, [last("Losses", model, "shipped", "0")])
        assert can_come_from(tiny, [last("Losses", model, "Tiny Shakespeare", "0")])
    assert can_come_from(rows["larger, see below"][2], [last("The replica", "larger (3)", "0")])
    counting = section("Counting", MEASUREMENTS).splitlines()
    counted = {line[0]: line[1:] for line in (row.strip("| ").split(" | ") for row in counting)}
    names = ["n-gram model, n = 1", "2", "3", "n-gram model, n = 4", "5", "6", "7"]
    texts = counted["shipped text"], counted["Tiny Shakespeare"]
    for name, *losses in zip(names, *texts, strict=True):
        assert rows[name][1:] == losses
    assert rows["small"][0] == f"{reference.count_parameters(65, 48, 56, 1):,}"
    assert rows["default"][0] == f"{reference.count_parameters(65, 128, 128, 3):,}"


def test_the_means_of_three_seeds():
    small = [float(last("Losses", "small", "Tiny Shakespeare", seed)) for seed in "012"]
    replica = [float(last("The replica", "default", seed)) for seed in "012"]
    text = " ".join(README.split())
    means = re.search(r"means of three seeds are (\S+) and (\S+),", text).groups()
    assert can_come_from(means[0], [np.mean(small)]) and can_come_from(means[1], [np.mean(replica)])
    larger = re.search(r"`seed = 1`, it gets (\S+)\.\)", text)[1]
    assert can_come_from(larger, [last("The replica", "larger", "1")])


def test_the_answers_have_the_losses_of_their_experiments():
    rows = re.findall(r"^\| (\d+) \| .* \| \d \| ([\d., ]+) \|$",
                      section("Experiments", MEASUREMENTS), re.M)
    base = [last("Losses", "small", "shipped", seed) for seed in "012"]
    intro, *parts = section("Experiments").split("\n### ")
    assert [figure for figure in losses_in(intro)] and all(
        can_come_from(figure, [*base, "0.02"]) for figure in losses_in(intro))
    for part in parts:
        number, answer = part.split(".")[0], part.split("</summary>")[1]
        runs = [losses.split(", ") for n, losses in rows if n == number]
        assert runs or "temperature" in part  # which needs no training
        figures = losses_in(re.sub(r"^```.*?^```", "", answer, flags=re.M | re.S))
        for figure in figures:
            assert can_come_from(figure, [*base, *itertools.chain(*runs)]), answer
        for losses in runs:  # the last one of each run is in the answer
            assert any(can_come_from(figure, [losses[-1]]) for figure in figures), answer


def test_the_table_of_the_ladder():
    table = rows_of(LADDER)
    rows = [table[name] for name in table if name not in ("After step", "---")]
    noted = [line.split("|")[2:4] for line in section("The ladder", MEASUREMENTS).splitlines()
             if re.match(r"\| \d\. ", line)]
    speeds = re.search(r"at ([\d,]+) tokens.*?at (.*)\. A full", MEASUREMENTS, re.S).groups()
    speeds = [int(n.replace(",", "")) for n in re.findall(r"\d+,\d+", " ".join(speeds))]
    sources = applied(experiments.ladder, forced(small=True))
    for row, losses, speed, source in zip(rows, noted, speeds, sources, strict=True):
        module = module_from(source)
        model = benchmark.new_model(module)
        size = benchmark.cache_bytes(module, model)
        assert row[2:4] == [f"{module.count_parameters(model):,}", f"{size:,}"]
        assert can_come_from(row[0], [losses[0]]) and can_come_from(row[1], [losses[1]])
        assert can_come_from(row[4], [speed / speeds[0]])


def test_what_the_ladder_is_worth_in_the_default_model():
    text = section(LADDER).split("<details>")[0]
    pattern = r"GPT-2 gets (\S+), .* gets (\S+)\. .* GPT-2 gets (\S+), .* eighth, at (\S+),"
    shown = re.search(pattern, " ".join(text.split())).groups()
    long = each_epoch("The ladder", "all steps", "20")
    assert long[7] == min(long)
    wanted = [last("The ladder", "GPT-2", "8"), last("The ladder", "all steps", "8"),
              last("Losses", "default", "shipped", "0"), long[7]]
    assert all(can_come_from(figure, [loss]) for figure, loss in zip(shown, wanted, strict=True))


def test_the_figures_of_the_larger_edits():
    text = " ".join(section("Larger edits").split())
    memory = measured("Speed", "memory in training, at most, MiB")
    assert re.search(r"takes (\d+) MiB instead of (\d+)", text).groups() == (memory[3], memory[1])
    shown = re.search(r"gets (\S+) with it, and (\S+) with `seed = 1`", text).groups()
    shown += re.search(r"It prints (\S+), (\S+), and (\S+)\. ", text).groups()
    rows = [("bfloat16", "0"), ("bfloat16", "1"), ("`lr = 0.003`",), ("`lr = 0.01`",),
            ("`lr = 0.03`",)]
    wanted = [last("Larger edits", *row) for row in rows]
    assert all(can_come_from(figure, [loss]) for figure, loss in zip(shown, wanted, strict=True))


def test_the_run_that_is_shown():
    """The losses are those of the small model with the plain wheels, here and in the lesson."""
    wanted = each_epoch("Losses", "small, plain wheels", "shipped", "0")
    for shown in (README, SOURCE):
        found = re.findall(r"Epoch \d \| train = \S+ \| val = (\S+) \|", shown)
        if shown is SOURCE and not found:
            missing("train.py shows no run")
        assert found == wanted


def test_the_settings_that_are_shown():
    shown = dict(re.findall(r"(\w+)=([\w.]+)", section("What you will see")))
    small = module_from(forced(small=True), "small")
    if any(shown[name] != str(getattr(small, name)) for name in small.SETTINGS):
        missing("the settings are not those that the README shows")
    assert shown["parameters"] == "44800"


def test_the_first_lines_that_are_shown():
    for line in re.findall(r"^(?:before|after) .*?  +(.*)$", README, re.M):
        if line.strip() not in SOURCE.split('"""')[1]:
            missing("train.py does not show the lines that the README shows")


def test_the_table_of_sections():
    titles = re.findall(r"^# %% (\d+\. .*)$", SOURCE, re.M)
    assert re.findall(r"(?<=[|,] )(\d+\. [^|,]*?)(?= \||,)", section("Reading train.py")) == titles


def test_the_header_of_the_script_asks_for_what_requirements_txt_asks_for():
    header = re.search(r"^# dependencies = \[(.*?)\]$", SOURCE, re.M | re.S)
    if not header:
        missing("train.py has no list of dependencies")
    wanted = (ROOT / "requirements.txt").read_text(encoding="utf-8").replace('"', "'").splitlines()
    assert sorted(re.findall(r'"(.*?)"', header[1])) == sorted(wanted)
