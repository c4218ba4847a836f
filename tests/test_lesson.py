"""The worked numbers in train.py's comments, read from there and computed here in another way."""

import ast
import math
import re
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import train
from conftest import ROOT
from mlx.utils import tree_flatten
from test_model import count

SOURCE = (ROOT / "train.py").read_text(encoding="utf-8")
COMMENTS = "".join(re.findall(r"^ *# ?(.*\n)", SOURCE, re.M))
PROSE = " ".join(f"{train.__doc__} {COMMENTS}".split())
inf = math.inf


def number(text):
    """0.5, -inf, 1/65, 8,320: as they stand in a table."""
    top, _, bottom = text.replace(",", "").partition("/")
    return float(top) / float(bottom or 1)


def rounded(value, text):
    """Whether a number is what the text says, to as many places as it gives."""
    places = len(text.partition(".")[2])
    return abs(value - float(text.replace(",", ""))) <= 0.5000001 * 10**-places


def said(pattern):
    """The numbers in the one place of the comments, or of the head, that reads like this."""
    found = re.findall(pattern, PROSE)
    assert len(found) == 1, (pattern, found)
    return [found[0]] if isinstance(found[0], str) else list(found[0])


def softmax(scores):
    e = np.exp(np.array(scores, dtype=float))
    return e / e.sum(-1, keepdims=True)


# Sections 3 and 4


def test_tokens_and_batch(shipped_text):
    vocab = sorted(set(shipped_text))
    assert [len(vocab)] == [int(n) for n in said(r"text has (\d+) different characters")]
    example, tokens = re.search(r'encode\("(.*?)"\) == (\[.*?\])', COMMENTS).groups()
    assert ast.literal_eval(tokens) == [vocab.index(c) for c in example]
    (beginning,) = said(r'The shipped text begins with "(.*?)"')
    assert shipped_text.startswith(beginning)
    (first,) = said(r"its first nine tokens are ([\d ]+)")
    first = [int(n) for n in first.split()]
    assert first == [vocab.index(c) for c in shipped_text[:9]]
    for name, expected in (("x", slice(0, 8)), ("y", slice(1, 9))):
        row = re.search(rf"^ +{name} = ((?:\d+ +){{8}}) (.*)$", COMMENTS, re.M)
        assert [int(n) for n in row[1].split()] == first[expected]
        assert row[2].replace(" ", "").replace("_", " ") == shipped_text[expected]


def test_places_of_two_rows():
    starts, offsets, places = said(r"(\[\[0\], \[10\]\]) \+ (\[[\d, ]+\]) is (\[\[.*?\]\])")
    starts, offsets, places = map(ast.literal_eval, (starts, offsets, places))
    assert places == [[start + offset for offset in offsets] for (start,) in starts]
    assert (np.array(starts) + np.array(offsets)).tolist() == places


# Section 5


def test_loss_table():
    p, loss = re.search(r"^ +p( .*)\n +loss( .*)$", COMMENTS, re.M).groups()
    for probability, price in zip(p.split(), loss.split(), strict=True):
        assert rounded(-math.log(number(probability)), price)
    assert len(p.split()) >= 4
    assert all(rounded(math.log(65), value) for value in re.findall(r"ln 65 = ([\d.]+\d)", PROSE))
    assert all(rounded(math.log(65), value) for value in said(r"Guessing blindly costs ([\d.]+\d)"))
    assert rounded(math.exp(1.5), said(r"exp\(1\.5\) = ([\d.]+\d)")[0])


def kneser_ney(train_tokens, val_tokens, vocab_size, order):
    """Mean loss, every token but the first scored, of counting `order` characters together.

    Interpolated modified Kneser-Ney: the highest order by its counts, each lower one by how many
    characters were seen before it; of counts of 1, 2, and 3 or more, a discount for each is taken,
    which the counts of the counts give, and goes to the next lower order.
    """
    def grams(tokens, n):  # each run of n tokens, as one number
        return sum(tokens[i : len(tokens) - n + 1 + i].astype(np.int64) * vocab_size ** (n - 1 - i)
                   for i in range(n))

    def look_up(keys, values, wanted):
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, values[at], 0)

    p = np.full(len(val_tokens) - 1, 1 / vocab_size)  # of each token of val but the first
    for n in range(1, order + 1):
        if n == order:
            keys, counts = np.unique(grams(train_tokens, n), return_counts=True)
        else:  # the number of different characters before it
            longer = np.unique(grams(train_tokens, n + 1))
            keys, counts = np.unique(longer % vocab_size**n, return_counts=True)
        n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
        discounts = np.zeros(4)
        if n1 and n2 and n3 and n4:
            y = n1 / (n1 + 2 * n2)
            discounts[1:] = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
        taken = discounts[np.minimum(counts, 3)]
        contexts, place = np.unique(keys // vocab_size, return_inverse=True)
        totals = np.bincount(place, counts)
        shares = np.bincount(place, taken) / totals

        # The first tokens of val have less before them, and are left at the order that this allows.
        here = grams(val_tokens, n) if n > 1 else val_tokens[1:]
        total = look_up(contexts, totals, here // vocab_size)
        lower = p[-len(here) :]
        p[-len(here) :] = np.where(
            total > 0, look_up(keys, counts - taken, here) / np.maximum(total, 1)
            + look_up(contexts, shares, here // vocab_size) * lower, lower)
    return -np.log(p).mean()


def test_what_counting_reaches(shipped_text):
    ladder = re.findall(r"(pays|brings that to|three together to|four to|seven to) (\d\.\d\d)\b", PROSE)
    orders = {"pays": 1, "brings that to": 2, "three together to": 3, "four to": 4, "seven to": 7}
    assert [orders[words] for words, _ in ladder][:3] == [1, 2, 3]
    vocab = {c: i for i, c in enumerate(sorted(set(shipped_text)))}
    tokens = np.array([vocab[c] for c in shipped_text])
    boundary = len(tokens) * 9 // 10
    for words, loss in ladder:
        found = kneser_ney(tokens[:boundary], tokens[boundary:], len(vocab), orders[words])
        assert rounded(found, loss), (words, found)
    assert "There it stops, and eight do no better" in PROSE
    assert kneser_ney(tokens[:boundary], tokens[boundary:], len(vocab), 8) > found
    assert said(r"more than a third of that tenth's pieces of (\w+) characters") == ["eight"]
    seen = {shipped_text[i : i + 8] for i in range(boundary - 7)}
    starts = range(boundary, len(tokens) - 7)
    assert 1 / 3 < sum(shipped_text[i : i + 8] not in seen for i in starts) / len(starts) < 0.4


def test_gradient_by_hand():
    def loss(w):
        p = 1 / (1 + math.exp(-w))
        return -0.75 * math.log(p) - 0.25 * math.log(1 - p)

    def gradient(w):
        return (loss(w + 1e-5) - loss(w - 1e-5)) / 2e-5  # by nudging, not by the formula

    at, before = said(r"At w = (\d+) the loss is ([\d.]+\d)")
    nudge, fall = said(r"Nudge w by ([\d.]+), and the loss falls by ([\d.]+\d)")
    (ratio,) = said(r"Their ratio, (-[\d.]+),")
    assert rounded(loss(float(at)), before)
    assert rounded(loss(0) - loss(float(nudge)), fall)
    assert rounded((loss(float(nudge)) - loss(0)) / float(nudge), ratio)
    (rate,) = (float(rate) for rate in said(r"w = w - (\d+) \* gradient"))

    rows = re.search(r"^ +(w) {2,}(.*)\n +(p) {2,}(.*)\n +(loss) {2,}(.*)\n +(gradient) +(.*)$",
                     COMMENTS, re.M).groups()[1::2]
    columns = list(zip(*(row.replace("= ln 3", "").split() for row in rows), strict=True))
    assert len(columns) == 6 and set(columns[4]) == {"..."}
    w = 0.0
    for column in (*columns[:4], columns[5]):
        assert rounded(w, column[0]) and rounded(1 / (1 + math.exp(-w)), column[1])
        assert rounded(loss(w), column[2]) and rounded(gradient(w), column[3])
        w = math.log(3) if column is columns[3] else w - rate * gradient(w)
    w = 0.0
    for _ in range(100):
        w -= rate * gradient(w)
    assert abs(w - math.log(3)) < 1e-6 and rounded(w, columns[5][0])

    (rate,) = said(r"With (\d+) in its place")
    w, then = said(r"the first step leads to w = (\d+), far .*? the loss there is ([\d.]+\d)")
    assert rounded(-float(rate) * gradient(0), w)
    assert rounded(loss(float(w)), then) and float(then) > loss(0)


# Section 6


def test_average_of_the_past_by_softmax():
    rows = re.findall(r"^ +softmax\((.*?)\) = (.*)$", COMMENTS, re.M)
    assert len(rows) == 3
    plain = re.findall(r"^ +1 +0 +0\n +1/2 +1/2 +0\n +1/3 +1/3 +1/3$", COMMENTS, re.M)
    assert len(plain) == 1
    for n, (scores, weights) in enumerate(rows, 1):
        weights = [number(weight) for weight in weights.split()]
        assert np.allclose(softmax([number(score) for score in scores.split(",")]), weights)
        assert np.allclose(weights, [1 / n] * n + [0] * (3 - n))


def test_the_example_of_attention():
    code = re.search(r"^ +import numpy as np\n(?: .+\n|\n)*? +out = .*$", COMMENTS, re.M)[0]
    names = {}
    exec(code.replace("    ", ""), names)
    assert names["out"].shape == (3, 2)

    # The same by hand: each position looks at itself and at those before it.
    q, k, v = names["q"], names["k"], names["v"]
    scores, weights, out = np.full((3, 3), -inf), np.zeros((3, 3)), np.zeros((3, 2))
    for t in range(3):
        for s in range(t + 1):
            scores[t, s] = sum(a * b for a, b in zip(q[t], k[s])) / math.sqrt(2)
        for s in range(t + 1):
            total = sum(math.exp(scores[t, i]) for i in range(t + 1))
            weights[t, s] = math.exp(scores[t, s]) / total
            out[t] += weights[t, s] * v[s]
    for name, expected in (("scores", scores), ("weights", weights), ("out", out)):
        assert np.allclose(names[name], expected), name
    printed = re.search(r"^ +scores +weights +out\n((?: .*\n){3})", COMMENTS, re.M)[1].splitlines()
    for t, line in enumerate(printed):
        for value, text in zip([*scores[t], *weights[t], *out[t]], line.split(), strict=True):
            assert value == float(text) or rounded(value, text), line


def test_what_the_matrix_product_is():
    a, b, c, d, *steps, total = map(int, said(
        r"\((\d), (\d)\) and \((\d), (\d)\) give (\d) \* (\d) \+ (\d) \* (\d) = (\d+)"))
    assert steps == [a, c, b, d] and total == a * c + b * d
    code = re.search(r"^ +import numpy as np\n(?: .+\n|\n)*? +out = .*$", COMMENTS, re.M)[0]
    names = {}
    exec(code.replace("    ", ""), names)
    *terms, x, y = said(r"equally good: ([\d.]+) of \((\d+), (\d+)\), ([\d.]+) of \((\d+), (\d+)\) "
                        r"and ([\d.]+) of \((\d+), (\d+)\) make about \(([\d.]+), ([\d.]+)\)")
    for t in range(3):
        share, first, second = terms[3 * t : 3 * t + 3]
        assert rounded(names["weights"][2, t], share)
        assert list(names["v"][t]) == [float(first), float(second)]
    assert rounded(names["out"][2, 0], x) and rounded(names["out"][2, 1], y)


def test_why_scores_are_divided():
    size, spread = said(r"as large as sqrt\((\d+)\) = ([\d.]+\d)")
    assert rounded(math.sqrt(float(size)), spread)
    pairs = np.random.default_rng(0).normal(size=(2, 100_000, int(size)))
    assert abs((pairs[0] * pairs[1]).sum(-1).var() / int(size) - 1) < 0.02
    examples = re.findall(r"softmax\(([\d.]+), 0\) = \(([\d.]+), ([\d.]+)\)", PROSE)
    assert [score for score, _, _ in examples] == [spread, "1"]
    for score, *weights in examples:
        assert all(map(rounded, softmax([float(score), 0]), weights))


def test_a_new_model_has_small_scores(tiny):
    tiny(ctx_len=64, n_emb=128, n_heads=4)
    mx.random.seed(0)
    model = train.GPT(65)
    x = model.wte(mx.random.randint(0, 65, (1, 64)))
    block = model.blocks[0]
    q, k, _ = block.mha.qkv(block.ln_1(x))
    assert 0 < mx.var(q @ k.transpose(0, 1, 3, 2)).item() < 0.1 * 32  # not divided yet


def test_reshapes_of_eight_numbers():
    x, text = re.search(r"^ +x = (np\.arange\(8\)\..*?) {2,}(.*)$", COMMENTS, re.M).groups()
    ways = re.findall(r"^ +(x\.reshape\(.*?\)) {2,}# (head 0 has .*): (right|wrong)$", COMMENTS, re.M)
    assert [which for _, _, which in ways] == ["right", "wrong"]
    x = eval(x, {"np": np})
    T, n_emb = x.shape
    assert [int(n) for n in re.findall(r"\b\d\b", text.split("has ")[1])] == list(x.ravel())
    for way, told, which in ways:
        found = eval(way, {"x": x})  # (n_heads, T, head_size), like attention's
        heads = [[int(n) for n in head.split()] for head in re.findall(r"has ([\d ]+\d)", told)]
        assert found.shape == (2, T, n_emb // 2) and [list(head.ravel()) for head in found] == heads
        parts = [x[:, :1], x[:, 1:]]  # what each head should have of every position
        assert all(map(np.array_equal, found, parts)) == (which == "right")


def test_what_is_compared_with_what():
    rows = re.findall(r"^ +(\(B, .*?\)) +scores (\(B, .*?\))$", COMMENTS, re.M)
    assert len(rows) == 2
    sizes = dict(B=2, n_heads=3, T=5, head_size=4)
    for operand, scores in rows:
        q = np.zeros(eval(operand, sizes))
        assert (q @ q.swapaxes(-1, -2)).shape == eval(scores, sizes)


# Section 7


def test_gelu_table():
    x, gelu = re.search(r"^ +x( +-.*)\n +gelu\(x\)( .*)$", COMMENTS, re.M).groups()
    assert x.split() == ["-3", "-1", "0", "1", "3"]
    for value, result in zip(x.split(), gelu.split(), strict=True):
        below = (1 + math.erf(float(value) / math.sqrt(2))) / 2
        assert rounded(float(value) * below, result)
        assert abs(nn.gelu(mx.array(float(value))).item() - float(value) * below) < 1e-6


def test_layer_norm_of_three_numbers():
    before, mean, without, variance, after = said(
        r"(\([\d, ]+\)), for example, has mean (\d), and without it is (\([-\d, ]+\)), with variance "
        r"(\d+/\d+); divided by the root of that it is (\([-\d., ]+\))")
    x = np.array(ast.literal_eval(before), dtype=float)
    assert x.mean() == float(mean) and list(x - x.mean()) == list(ast.literal_eval(without))
    assert math.isclose(x.var(), number(variance))
    found = (x - x.mean()) / x.std()
    assert all(map(rounded, found, after.strip("()").split(", ")))
    assert np.allclose(np.array(nn.LayerNorm(3)(mx.array(x, dtype=mx.float32))), found, atol=1e-4)


# Section 8


def test_tea_and_eta(tiny):
    assert said(r'The "(.)" of "(.*?)" would see what the "(.)" of "(.*?)" sees') == [
        "a", "tea", "a", "eta"]
    mx.random.seed(0)
    model = train.GPT(3)
    attention = train.MultiHeadAttention()  # whose weights are large enough to see something
    words = mx.array([["aet".index(c) for c in word] for word in ("tea", "eta")])
    without = attention(model.wte(words))[:, -1]
    assert mx.abs(without[0] - without[1]).max() < 1e-6
    positions = model.wpe(mx.arange(3))
    with_them = attention(50 * (model.wte(words) + positions))[:, -1]
    assert mx.abs(with_them[0] - with_them[1]).max() > 1e-2


def test_table_of_parameters(tiny):
    tiny(ctx_len=128, n_emb=128, n_heads=4, n_layers=3)  # the default model
    sizes = Counter()
    for name, weight in tree_flatten(train.GPT(65).parameters()):
        name = name.replace("blocks.0.", "").rsplit(".", 1)[0]
        if not name.startswith("blocks."):
            sizes[name] += weight.size
    lines = re.search(r"^ +wte {3,}(?:.*\n)*? +[\d,]+\n\n", COMMENTS, re.M)[0].splitlines()
    rows = [(line[:line.rindex("  ")].split(), line.split()[-1].replace(",", ""))
            for line in lines if line.strip()]
    block = sum(n for name, n in sizes.items() if name.startswith(("ln_1", "ln_2", "m")))
    expected = [
        ("wte 65 x 128", sizes["wte"]), ("wpe 128 x 128", sizes["wpe"]),
        ("a block ln_1 and ln_2", sizes["ln_1"] + sizes["ln_2"]),
        ("mha: q, k, v 3 x", sizes["mha.q_proj"]), ("c_proj", sizes["mha.c_proj"]),
        ("mlp: c_fc", sizes["mlp.c_fc"]), ("c_proj", sizes["mlp.c_proj"]),
        (f"{block:,} x 3", 3 * block), ("ln_f", sizes["ln_f"]),
        ("lm_head 128 x 65, and 65 biases", sizes["lm_head"]), ("", 627_009)]
    assert sizes["mha.q_proj"] == sizes["mha.k_proj"] == sizes["mha.v_proj"] == 128 * 128
    assert sizes["lm_head"] == 128 * 65 + 65
    assert sum(n for name, n in sizes.items()) + 2 * block == 627_009 == count(65, 128, 128, 3)
    for line, (words, size) in zip([line for line in lines if line.strip()], expected, strict=True):
        assert line.split() == [*words.split(), f"{size:,}"]


def test_size_of_gpt_2():
    n_emb, n_heads, layers, ctx_len, vocab, millions = (int(n.replace(",", "")) for n in said(
        r"GPT-2 has n_emb = (\d+), (\d+) heads, (\d+) layers, ctx_len = (\d+) and ([\d,]+) tokens, "
        r"which makes (\d+) million parameters"))
    ours = count(vocab, ctx_len, n_emb, layers)
    theirs = ours - (vocab * n_emb + vocab) + layers * 3 * n_emb  # no lm_head, but biases
    assert n_emb % n_heads == 0 and round(theirs / 1e6) == millions


# Section 9


def adam(gradients):
    """The ratio by which lr is multiplied in the last step, from the three lines of the comment."""
    m = v = 0
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    return m / (1 - 0.9**t) / math.sqrt(v / (1 - 0.99**t))


def adam_of_mlx(gradients):
    optimizer = optim.AdamW(1.0, betas=[0.9, 0.99], eps=1e-12, weight_decay=0, bias_correction=True)
    w = {"w": mx.array([0.0])}
    for g in gradients:
        before = w["w"].item()
        w = optimizer.apply_gradients({"w": mx.array([float(g)])}, w)
    return before - w["w"].item()


def test_adam_with_numbers():
    assert "m = 0.9 * m + 0.1 * g v = 0.99 * v + 0.01 * g * g w = w - lr * m / sqrt(v)" in PROSE
    small, large, ratio = said(r"stays the same, be it ([\d.]+) or (\d+), the ratio .*?is (\d+)")
    for g in (float(small), float(large)):
        for n in (1, 2, 100):
            assert rounded(adam([g] * n), ratio)
            assert abs(adam_of_mlx([g] * n) - adam([g] * n)) < 1e-3
    (ratio,) = said(r"between 1 and -1, for example, the ratio is only ([\d.]+\d)")
    for n in (2, 10, 1000):
        assert rounded(abs(adam([1, -1] * (n // 2))), ratio)
    assert abs(adam_of_mlx([1, -1] * 5) - adam([1, -1] * 5)) < 1e-3


# Section 10


def test_temperature_table():
    logits = re.search(r"^ +logits +(\d.*)$", COMMENTS, re.M)[1].split()
    rows = re.findall(r"^ +temperature (\d\S*)( .*)$", COMMENTS, re.M)
    assert len(rows) == 3
    for temperature, shares in rows:
        expected = softmax(np.array(logits, dtype=float) / float(temperature))
        assert len(shares.split()) == len(logits)
        assert all(map(rounded, expected, shares.split()))


def test_the_plain_loop_writes_what_generate_writes(tiny):
    loop = re.search(r"^ +for _ in range\(100\):\n +.*\n +.*$", COMMENTS, re.M)[0]
    loop = re.sub(r"^    ", "", loop, flags=re.M).replace("100", "10")  # 2 + 10 fill the window
    mx.random.seed(0)
    model = train.GPT(11)
    names = dict(vars(train), model=model, tokens=[1, 2])
    names["sample"] = lambda logits: train.sample(logits, temperature=0)
    exec(loop, names)
    assert names["tokens"] == [1, 2, *model.generate([1, 2], 10, temperature=0)]
    assert len(set(names["tokens"])) > 3


# The head of the file


def test_requirements_are_those_of_the_head():
    head = re.search(r"^# /// script\n((?:# .*\n)+?)# ///$", SOURCE, re.M)[1]
    head = re.sub(r"^# ?", "", head, flags=re.M)
    needed = ast.literal_eval(re.search(r"dependencies = (\[.*?\])\n", head, re.S)[1])
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(needed) == sorted(line.replace('"', "'") for line in lines if line.strip())
    assert 'requires-python = ">=3.10"' in head
