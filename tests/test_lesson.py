"""The worked numbers in train.py: its doctests, and its tables, computed here in another way.

For a reader, a table that is no longer there is skipped. Under CI it is missed.
"""

import doctest
import math
import re

import counting
import numpy as np
import pytest
import reference
import train
from helpers import SOURCE, agrees, missing

HEAD = SOURCE.split('"""')[1]
PROSE = " ".join(" ".join([HEAD, *re.findall(r"^ *# ?(.*)$", SOURCE, re.M)]).split())
# Each indented piece of the comments, as a list of its lines.
TABLES = [[line[1:].strip() for line in piece.splitlines()]
          for piece in re.findall(r"(?:^#     .*\n)+", SOURCE, re.M)]


def table(*labels):
    """The cells of the table whose rows begin with these labels: for each row, its words."""
    for lines in TABLES:
        rows = list(zip(labels, lines, strict=False))
        if len(labels) == len(lines) and all(line.startswith(label + " ") for label, line in rows):
            return [line.removeprefix(label).split() for label, line in rows]
    missing(f"train.py has no table with the rows {', '.join(labels)}")


def number(text):
    """What 0.5, -inf, 1/65, and 8,320 mean."""
    top, _, bottom = text.replace(",", "").partition("/")
    try:
        return float(top) / float(bottom or 1)
    except ValueError:
        missing(f"{text!r}, in a table of train.py, is not a number")


def numbers(cells):
    return np.array([number(cell) for cell in cells])


def rows_agree(values, cells):
    """Whether numbers are what cells say, to as many places as those give."""
    places = [len(text.partition(".")[2]) for text in cells]
    return len(values) == len(cells) and all(map(agrees, values, numbers(cells), places))


def softmax(*scores):
    return reference.softmax(np.array(scores))


def test_doctests():
    result = doctest.testmod(train)
    assert result.attempted > 0 and result.failed == 0


def test_rows_of_a_batch(shipped_text):
    vocab = sorted(set(shipped_text))
    for shift, cells in enumerate(table("x =", "y =")):
        text = shipped_text[shift : shift + len(cells) // 2]
        assert cells == [str(vocab.index(c)) for c in text] + list(text.replace(" ", "_"))


def test_n_grams(shipped_text):
    orders, losses = table("n", "loss")
    found = counting.losses_of(shipped_text)
    assert rows_agree([found[int(n) - 1] for n in orders], losses)


def two_letters(w):
    """Of the model with one parameter: p, the loss, and its slope, by nudging."""
    def loss(w):
        p, q = softmax(w, 0)
        return -0.75 * math.log(p) - 0.25 * math.log(q)

    return softmax(w, 0)[0], loss(w), (loss(w + 1e-5) - loss(w - 1e-5)) / 2e-5


def test_gradient_descent():
    w = 0.0
    for cells in zip(*table("w", "p", "loss"), strict=True):
        if cells[0] != "...":
            assert rows_agree([w, *two_letters(w)[:2]], cells)
        for _ in range(100 if cells[0] == "..." else 1):
            w -= 2 * two_letters(w)[2]


def test_averages_by_softmax():
    for n, cells in enumerate(table("1", "1/2", "1/3"), 1):
        weights, scores = " ".join([f"1/{n}", *cells]).split(" = softmax(")
        scores = numbers(scores.strip(")").split(", "))
        assert np.allclose(softmax(*scores), numbers(weights.split()))


@pytest.mark.parametrize("labels, functions", [
    (("p", "loss"), [lambda p: -np.log(p)]),
    (("head_size", "sqrt(head_size)", "softmax(that, 0)[0]"),
     [np.sqrt, lambda n: 1 / (1 + np.exp(-np.sqrt(n)))]),
    (("x", "gelu(x)"), [lambda x: x * [(1 + math.erf(n / math.sqrt(2))) / 2 for n in x]]),
    (("x", "minus the mean, 3", "divided by the root of 14/3"),
     [lambda x: x - x.mean(), lambda x: (x - x.mean()) / x.std()]),
    (("logits", "temperature 0.5", "temperature 1", "temperature 2"),
     [lambda s: softmax(*s / 0.5), lambda s: softmax(*s), lambda s: softmax(*s / 2)])],
    ids=["loss", "division of scores", "GELU", "LayerNorm", "temperatures"])
def test_table(labels, functions):
    first, *rows = table(*labels)
    for function, cells in zip(functions, rows, strict=True):
        assert rows_agree(function(numbers(first)), cells[: len(first)])  # a remark may follow


def test_parameters_of_the_default_model():
    lines = next((lines for lines in TABLES if lines[0].startswith("wte ")), [])
    found = numbers(re.findall(r"\b\d[\d,]*\b", " ".join(lines))).tolist()
    C, linear, wide = 128, 128 * 128 + 128, 4 * 128 * 128
    block = 4 * C + 4 * linear + (wide + 4 * C) + (wide + C)
    total = reference.count_parameters(65, 128, C, 3)
    expected = [65, C, 65 * C, 128, C, 128 * C,  # wte and wpe
                4 * C, C, 3, linear, C, C, C, linear,  # LayerNorms and attention
                wide + 4 * C, C, 4 * C, 4 * C, wide + C, 4 * C, C, C,  # MLP
                block, 3, 3 * block, 2 * C, total]
    assert found == expected or not found and missing("train.py has no table of the parameters")


def adam(signs):
    """How large m / sqrt(v) typically is, late in a run whose gradients are 1 and -1."""
    optimizer = reference.AdamW(0.9, 0.99, 0.0)
    moves = [optimizer.step(0.0, sign, 1.0) for sign in signs]
    return np.std(moves[len(moves) // 2 :])


# Numbers in sentences
NUMBER = r"(-?\d[\d,]*\.?\d*)"


@pytest.mark.parametrize("pattern, value", [
    (rf"ln 65 = {NUMBER}", lambda: math.log(65)),
    (rf"exp\(1\.5\) = {NUMBER}", lambda: math.exp(1.5)),
    (rf"\(2, 1, 0\) -> \({NUMBER}", lambda: softmax(2, 1, 0)[0]),
    (rf"rate of 20\D* w = {NUMBER}", lambda: -20 * two_letters(0)[2]),
    (rf"rate of 20\D* w = 5,\D* {NUMBER}", lambda: two_letters(5)[1]),
    (rf"carries {NUMBER} of these", lambda: 12 * 768),
    (rf"0\.6 and 0\.4\D* {NUMBER}", lambda: -np.log([0.6, 0.4]).mean()),
    (rf"50,257 tokens\D* {NUMBER} million",
     lambda: reference.count_parameters(50257, 1024, 768, 12) / 1e6),
    (rf"0\.9 \*\* 10 = {NUMBER}", lambda: 0.9**10),
    (rf"m / sqrt\(v\) would be up to {NUMBER}",
     lambda: max((1 - 0.9**t) / math.sqrt(1 - 0.99**t) for t in range(1, 100))),
    (rf"the ratio is only {NUMBER}", lambda: adam([1, -1] * 2000)),
    (rf"random signs\D* {NUMBER}",
     lambda: adam(np.random.default_rng(0).choice([-1, 1], size=20_000)))])
def test_number_in_a_sentence(pattern, value):
    found = re.findall(pattern, PROSE)
    if not found:
        missing(f"train.py has no sentence like {pattern}")
    assert all(rows_agree([value()], [text.rstrip(",.")]) for text in found), found


def test_sections_are_those_of_the_contents():
    marks = re.findall(r"^# %% (\d+\. .*)$", SOURCE, re.M)
    assert [int(mark.split(".")[0]) for mark in marks] == list(range(1, len(marks) + 1))
    assert len(marks) >= 13 and all(mark in HEAD for mark in marks)
    assert f"{len(marks) + 1}. " not in HEAD
