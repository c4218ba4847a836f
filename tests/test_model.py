"""Sections 5 to 8: the model, against a second one written in NumPy, and against mathematics."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import train
from mlx.utils import tree_flatten, tree_map, tree_unflatten

V = 11


@pytest.fixture
def tiny(tiny):
    tiny(n_layers=2)
    return tiny


def make(seed=0, spread=0.0):
    """A model; `spread` is added noise, so that no bias is 0 and no gain 1 in a comparison."""
    mx.random.seed(seed)
    model = train.GPT(V)
    if spread:
        model.update(tree_map(lambda w: w + spread * mx.random.normal(w.shape),
                              model.parameters()))
    model.eval()
    return model


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape)


def numpy_gpt(weights, x, n_heads, start=0, looks=None):
    """GPT-2's forward pass of one row of tokens, in float64, head by head.

    The list `looks` gets, for each head of each block, how much the last position looks at each.
    """
    w = {name: np.array(value, dtype=np.float64) for name, value in weights}
    erf = np.vectorize(math.erf)

    def norm(h, name):
        mean = h.mean(-1, keepdims=True)
        variance = ((h - mean) ** 2).mean(-1, keepdims=True)
        return (h - mean) / np.sqrt(variance + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    def linear(h, name):
        return h @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    h = w["wte.weight"][x] + w["wpe.weight"][start : start + len(x)]
    width = h.shape[1] // n_heads
    for i in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks"))):
        block = f"blocks.{i}."
        a = norm(h, block + "ln_1")
        q, k, v = (linear(a, f"{block}mha.{p}_proj") for p in "qkv")
        heads = []
        for start in range(0, h.shape[1], width):
            part = slice(start, start + width)
            out = np.zeros((len(x), width))
            for t in range(len(x)):
                scores = [q[t, part] @ k[s, part] / math.sqrt(width) for s in range(t + 1)]
                e = np.exp(np.array(scores) - max(scores))
                out[t] = (e / e.sum()) @ v[: t + 1, part]
            if looks is not None:
                looks.append(e / e.sum())
            heads.append(out)
        h = h + linear(np.concatenate(heads, axis=1), block + "mha.c_proj")
        m = linear(norm(h, block + "ln_2"), block + "mlp.c_fc")
        m = m * (1 + erf(m / math.sqrt(2))) / 2
        h = h + linear(m, block + "mlp.c_proj")
    return linear(norm(h, "ln_f"), "lm_head")


def numpy_loss(weights, text, ctx_len, n_heads):
    """The mean loss over the tokens of a text, in rows, as evaluate() should find it."""
    losses = []
    for start in range(0, len(text) - ctx_len, ctx_len):
        logits = numpy_gpt(weights, text[start : start + ctx_len], n_heads)
        labels = text[start + 1 : start + ctx_len + 1]
        losses += list(np.log(np.exp(logits).sum(-1)) - logits[np.arange(ctx_len), labels])
    return np.mean(losses)


@pytest.mark.parametrize("n_heads, T", [(1, 12), (2, 12), (4, 7), (16, 1)])
def test_forward_pass_equals_numpy(tiny, n_heads, T):
    tiny(n_heads=n_heads)
    model = make(spread=0.2)
    x = tokens(3, T)
    logits = np.array(model(mx.array(x)))
    assert logits.shape == (3, T, V)
    for row in range(3):
        expected = numpy_gpt(tree_flatten(model.parameters()), x[row], n_heads)
        assert np.abs(expected).max() > 0.5  # the comparison is about something
        assert np.abs(logits[row] - expected).max() < 1e-5


def test_tokens_can_stand_at_later_positions(tiny):
    model = make(spread=0.2)
    x = tokens(1, 5)
    for start in range(8):
        expected = numpy_gpt(tree_flatten(model.parameters()), x[0], 2, start)
        assert np.abs(np.array(model(mx.array(x), start))[0] - expected).max() < 1e-5
    with pytest.raises(ValueError, match="13 .* ctx_len = 12"):
        model(mx.array(x), 8)


def test_loss_is_the_mean_cross_entropy(tiny):
    model = make(spread=0.2)
    x, y = tokens(3, 12), tokens(3, 12, seed=1)
    losses = []
    for row in range(3):
        logits = numpy_gpt(tree_flatten(model.parameters()), x[row], train.n_heads)
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        losses += [-math.log(p[t, y[row, t]]) for t in range(12)]
    loss = train.loss_fn(model, mx.array(x), mx.array(y))
    assert loss.shape == () and abs(loss.item() - np.mean(losses)) < 1e-5


def test_gradients_against_finite_differences(tiny):
    tiny(ctx_len=5, n_emb=8, n_layers=2)
    model = make(spread=0.2)
    x, y = tokens(2, 5), tokens(2, 5, seed=1)
    _, grads = nn.value_and_grad(model, train.loss_fn)(model, mx.array(x), mx.array(y))
    weights = tree_flatten(model.parameters())
    rng = np.random.default_rng(0)

    def loss(changed_name, change):
        total = 0.0  # of the float64 model, so that differences are not lost in rounding
        changed = [(n, np.array(w, dtype=np.float64) + (change if n == changed_name else 0))
                   for n, w in weights]
        for row in range(2):
            logits = numpy_gpt(changed, x[row], train.n_heads)
            total -= sum(logits[t, y[row, t]] - np.log(np.exp(logits[t]).sum()) for t in range(5))
        return total / 10

    for name, gradient in tree_flatten(grads):
        direction = rng.normal(size=gradient.shape)
        expected = (loss(name, 1e-5 * direction) - loss(name, -1e-5 * direction)) / 2e-5
        found = (np.array(gradient, dtype=np.float64) * direction).sum()
        assert abs(found - expected) < 1e-5 + 1e-4 * abs(expected), name
    assert {name for name, _ in tree_flatten(grads)} == {name for name, _ in weights}


def test_no_logit_sees_a_later_character(tiny):
    model = make(spread=0.2)
    x = tokens(1, 12)
    logits = np.array(model(mx.array(x)))
    for t in range(12):
        other = x.copy()
        other[0, t] = (x[0, t] + 1) % V
        changed = np.array(model(mx.array(other)))
        assert (changed[0, :t] == logits[0, :t]).all()
        assert (np.abs(changed[0, t:] - logits[0, t:]).max(axis=-1) > 1e-4).all()


def test_any_length_up_to_ctx_len(tiny):
    model = make(spread=0.2)
    x = mx.array(tokens(2, 12))
    whole = np.array(model(x))
    for T in range(1, 13):
        assert np.abs(np.array(model(x[:, :T])) - whole[:, :T]).max() < 1e-5
    with pytest.raises(ValueError, match="13 .* ctx_len = 12"):
        model(mx.array(tokens(1, 13)))


def test_rows_of_a_batch_know_nothing_of_each_other(tiny):
    model = make(spread=0.2)
    x = tokens(3, 12)
    together = np.array(model(mx.array(x)))
    for row in range(3):
        assert np.abs(np.array(model(mx.array(x[row : row + 1])))[0] - together[row]).max() < 1e-5


def test_settings_are_read_when_the_model_is_built(tiny):
    tiny(n_emb=32, n_heads=8, n_layers=1, ctx_len=5)
    model = train.GPT(65)
    assert model.wte.weight.shape == (65, 32) and model.wpe.weight.shape == (5, 32)
    assert len(model.blocks) == 1 and model(mx.zeros((2, 5), dtype=mx.int32)).shape == (2, 5, 65)


def test_first_loss_is_that_of_guessing(tiny):
    tiny(n_emb=64, n_heads=4, n_layers=3, ctx_len=64)
    mx.random.seed(0)
    model = train.GPT(65)
    x, y = (mx.array(np.random.default_rng(s).integers(0, 65, (8, 64))) for s in (0, 1))
    assert abs(train.loss_fn(model, x, y).item() - math.log(65)) < 0.05


def test_initialisation(tiny):
    tiny(n_emb=128, n_heads=4, n_layers=3, ctx_len=128)
    mx.random.seed(0)
    for name, weight in tree_flatten(train.GPT(65).parameters()):
        w = np.array(weight)
        if w.ndim == 1:
            assert (w == (0 if name.endswith("bias") else 1)).all(), name
        else:
            std = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02
            assert abs(w.std() / std - 1) < 0.04 and abs(w.mean()) < 0.1 * std, name


def count(V, T, C, L):
    attention = 4 * C * C + C
    mlp = 4 * C * C + 4 * C + 4 * C * C + C
    return V * C + T * C + L * (attention + mlp + 4 * C) + 2 * C + C * V + V


@pytest.mark.parametrize("V, T, C, H, L", [(11, 12, 16, 2, 2), (65, 128, 128, 4, 3)])
def test_number_of_parameters(tiny, V, T, C, H, L):
    tiny(ctx_len=T, n_emb=C, n_heads=H, n_layers=L)
    assert sum(w.size for _, w in tree_flatten(train.GPT(V).parameters())) == count(V, T, C, L)


def test_names_and_biases(tiny):
    names = {name for name, _ in tree_flatten(make().parameters())}
    attention = {f"mha.{p}_proj.weight" for p in "qkvc"} | {"mha.c_proj.bias"}
    mlp = {f"mlp.{layer}.{kind}" for layer in ("c_fc", "c_proj") for kind in ("weight", "bias")}
    norms = {f"ln_{i}.{kind}" for i in "12" for kind in ("weight", "bias")}
    blocks = {f"blocks.{i}.{name}" for i in (0, 1) for name in attention | mlp | norms}
    ends = {"wte.weight", "wpe.weight"} | {f"{layer}.{kind}" for layer in ("ln_f", "lm_head")
                                           for kind in ("weight", "bias")}
    assert names == blocks | ends


def test_dropout_works_in_training_only(tiny):
    tiny(dropout=0.5)
    model = make(spread=0.2)
    x = mx.array(tokens(2, 12))
    assert mx.array_equal(model(x), model(x))
    quiet = model(x)
    model.train()
    assert not mx.array_equal(model(x), model(x))
    model.eval()
    assert mx.array_equal(model(x), quiet)


@pytest.mark.parametrize("place", ["dropout", "blocks.0.mha.attn_dropout",
                                   "blocks.0.mha.resid_dropout", "blocks.0.mlp.dropout"])
def test_dropout_stands_where_gpt_2_has_it(tiny, place):
    tiny(dropout=0.5)
    model = make(spread=0.2)
    x = mx.array(tokens(2, 12))
    dict(model.named_modules())[place].train()
    assert not mx.array_equal(model(x), model(x)), place


@pytest.mark.parametrize("T, S", [(1, 1), (3, 3), (1, 4), (2, 5)])
def test_causal_mask(T, S):
    mask = np.array(train.causal_mask(T, S))
    assert mask.shape == (T, S)
    for t in range(T):  # the query at position S - T + t
        for s in range(S):
            assert mask[t, s] == (-math.inf if s > S - T + t else 0)


def test_parts_of_attention(tiny):
    attention = train.MultiHeadAttention()
    x = np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)
    parts = [np.array(part) for part in attention.qkv(mx.array(x))]
    for part, name in zip(parts, ("q_proj", "k_proj", "v_proj")):
        whole = x @ np.array(attention[name].weight).T  # (B, T, n_emb)
        assert part.shape == (3, 2, 5, 8)
        for head in range(2):
            assert np.abs(part[:, head] - whole[..., 8 * head : 8 * head + 8]).max() < 1e-5
    q, k, _ = parts
    for T in (5, 2, 1):  # queries of the last T positions
        weights = np.array(attention.weights(mx.array(q[:, :, -T:]), mx.array(k)))
        assert weights.shape == (3, 2, T, 5)
        assert np.abs(weights.sum(-1) - 1).max() < 1e-6
        for t in range(T):
            seen = 5 - T + t + 1
            e = np.exp((q[:, :, seen - 1, None] * k[:, :, :seen]).sum(-1) / math.sqrt(8))
            expected = e / e.sum(-1, keepdims=True)
            assert np.abs(weights[:, :, t, :seen] - expected).max() < 1e-5
            assert (weights[:, :, t, seen:] == 0).all()


def test_attention_with_equal_scores_is_the_average_of_the_past(tiny):
    tiny(n_heads=1)
    attention = train.MultiHeadAttention()
    attention.eval()
    eye, zero = mx.eye(train.n_emb), mx.zeros((train.n_emb, train.n_emb))
    attention.update(tree_unflatten([
        ("q_proj.weight", zero), ("k_proj.weight", eye), ("v_proj.weight", eye),
        ("c_proj.weight", eye), ("c_proj.bias", mx.zeros(train.n_emb))]))
    x = np.random.default_rng(0).normal(size=(1, 3, train.n_emb)).astype(np.float32)
    averages = np.array([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]]) @ x[0]
    assert np.abs(np.array(attention(mx.array(x)))[0] - averages).max() < 1e-5
