"""The worked numbers in train.py: its doctests, and its tables, computed here in another way.

For a reader, a table that is no longer there is skipped. Under CI it is missed.
"""

import doctest
import math
import re

import numpy as np
import pytest
import reference
import train
from helpers import SOURCE, agrees, missing

COMMENTS = re.findall(r"^# ?(.*)$", SOURCE, re.M)
PROSE = " ".join(" ".join([SOURCE.split('"""')[1], *COMMENTS]).split())


def tables():
    """Each indented piece of the comments, as a list of its lines."""
    for piece in re.findall(r"(?:^#     .*\n)+", SOURCE, re.M):
        yield [line[1:].strip() for line in piece.splitlines()]


def table(*labels):
    """The cells of the table whose rows begin with these labels: for each row, its words."""
    for lines in tables():
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


def rows_agree(values, cells):
    """Whether numbers are what cells say, to as many places as those give."""
    places = [len(text.partition(".")[2]) for text in cells]
    return len(values) == len(cells) and all(map(agrees, values, map(number, cells), places))


def test_doctests():
    result = doctest.testmod(train)
    assert result.attempted > 0 and result.failed == 0


def test_rows_of_a_batch(shipped_text):
    vocab = sorted(set(shipped_text))
    for shift, cells in enumerate(table("x =", "y =")):
        text = shipped_text[shift : shift + len(cells) // 2]
        assert cells == [str(vocab.index(c)) for c in text] + list(text.replace(" ", "_"))


def test_loss_of_a_probability():
    p, loss = table("p", "loss")
    assert rows_agree([-math.log(number(cell)) for cell in p], loss)


def test_n_grams(shipped_text):
    orders, losses = table("n", "loss")
    tokens = np.unique(list(shipped_text), return_inverse=True)[1]
    train_text, val_text = np.split(tokens, [len(tokens) * 9 // 10])
    found = reference.kneser_ney(train_text, val_text, 65, max(map(int, orders)))
    assert rows_agree([found[int(n) - 1] for n in orders], losses)


def two_letters(w):
    """The loss of the model with one parameter, and its slope, by nudging."""
    def loss(w):
        p = math.exp(w) / (math.exp(w) + 1)
        return -0.75 * math.log(p) - 0.25 * math.log(1 - p)

    return loss(w), (loss(w + 1e-5) - loss(w - 1e-5)) / 2e-5


def test_gradient_descent():
    w = 0.0
    for cells in zip(*table("w", "p", "loss"), strict=True):
        if cells[0] == "...":
            for _ in range(100):
                w -= 2 * two_letters(w)[1]
            continue
        loss, slope = two_letters(w)
        assert rows_agree([w, math.exp(w) / (math.exp(w) + 1), loss], cells)
        w -= 2 * slope


def test_averages_by_softmax():
    for n, cells in enumerate(table("1", "1/2", "1/3"), 1):
        weights, scores = " ".join([f"1/{n}", *cells]).split(" = ")
        scores = [number(cell) for cell in re.findall(r"[-\w]+", scores.removeprefix("softmax"))]
        assert np.allclose(reference.softmax(np.array(scores)), list(map(number, weights.split())))


def test_why_scores_are_divided():
    sizes, roots, shares = table("head_size", "sqrt(head_size)", "softmax(that, 0)[0]")
    for size, root, share in zip(map(int, sizes), roots, shares, strict=True):
        first = reference.softmax(np.array([math.sqrt(size), 0]))[0]
        assert rows_agree([math.sqrt(size), first], [root, share])


def test_gelu():
    x, gelu = table("x", "gelu(x)")
    x = np.array([number(cell) for cell in x])
    exact = x * [(1 + math.erf(value / math.sqrt(2))) / 2 for value in x]
    assert rows_agree(exact, gelu)


def test_layer_norm():
    x, centered, normed = table("x", "minus the mean, 3", "divided by the root of 14/3")
    x = np.array([number(cell) for cell in x])
    assert x.mean() == 3 and math.isclose(x.var(), 14 / 3)
    assert rows_agree(x - 3, centered) and rows_agree((x - 3) / x.std(), normed[: len(x)])


def test_parameters_of_the_default_model():
    lines = next((lines for lines in tables() if lines[0].startswith("wte ")), [])
    rows = [[int(n.replace(",", "")) for n in re.findall(r"\b\d[\d,]*\b", line)] for line in lines]
    if len(rows) != 10:
        missing("train.py has no table of the parameters, or one with other rows")
    V, C, T, L = rows[0][0], rows[0][1], rows[1][0], rows[7][1]
    linear = C * C + C  # a matrix and its biases
    block = 4 * C + 8 * linear + 4 * C * C + C
    expected = [[V, C, V * C], [T, C, T * C], [4 * C], [3, linear], [linear], [4 * linear],
                [4 * C * C + C], [block, L, L * block], [2 * C],
                [reference.count_parameters(V, T, C, L)]]
    for found, numbers in zip(rows, expected, strict=True):
        assert found[: len(numbers)] == numbers  # a remark may follow


def test_temperatures():
    logits, half, one, two = table("logits", "temperature 0.5", "temperature 1", "temperature 2")
    logits = np.array([number(cell) for cell in logits])
    for temperature, cells in ((0.5, half), (1, one), (2, two)):
        assert rows_agree(reference.softmax(logits / temperature), cells)


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
    (rf"\(2, 1, 0\) -> \({NUMBER}", lambda: reference.softmax(np.array([2, 1, 0]))[0]),
    (rf"rate of 20\D* w = {NUMBER}", lambda: -20 * two_letters(0)[1]),
    (rf"rate of 20\D* w = 5,\D* {NUMBER}", lambda: two_letters(5)[0]),
    (rf"1 \* 3 \+ 2 \* 4 = {NUMBER}", lambda: np.dot([1, 2], [3, 4])),
    (rf"twelve layers with slopes of 1/2, only 1/{NUMBER}", lambda: 2**12),
    (rf"carries {NUMBER} of these", lambda: 12 * 768),
    (rf"50,257 tokens\D* {NUMBER} million",
     lambda: reference.count_parameters(50257, 1024, 768, 12) / 1e6),
    (rf"ratio of 2 : 1 becomes {NUMBER}", lambda: 2**2),
    (rf"the ratio is only {NUMBER}", lambda: adam([1, -1] * 2000)),
    (rf"random signs\D* {NUMBER}",
     lambda: adam(np.random.default_rng(0).choice([-1, 1], size=20_000))),
])
def test_number_in_a_sentence(pattern, value):
    found = re.findall(pattern, PROSE)
    if not found:
        missing(f"train.py has no sentence like {pattern}")
    assert all(rows_agree([value()], [text.rstrip(",.")]) for text in found), found


def test_sections_are_those_of_the_contents():
    marks = re.findall(r"^# %% (\d+\. .*)$", SOURCE, re.M)
    assert [int(mark.split(".")[0]) for mark in marks] == list(range(1, len(marks) + 1))
    contents = SOURCE.split('"""')[1]
    assert len(marks) >= 13 and all(mark in contents for mark in marks)
    assert str(len(marks) + 1) + ". " not in contents
