"""Sections 6 to 8: attention and the model, against the reference and against mathematics."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
import train
from mlx.utils import tree_flatten

V = 11  # tokens


def build(ctx_len=12, n_emb=16, n_heads=2, n_layers=2, dropout=0.0):
    """A model in eval mode with random weights, and these as NumPy arrays by name."""
    model = train.GPT(train.GPTConfig(V, ctx_len, n_emb, n_heads, n_layers, dropout))
    weights = reference.random_weights(V, ctx_len, n_emb, n_layers)
    model.load_weights([(name, mx.array(weight)) for name, weight in weights.items()])
    model.eval()
    return model, weights


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape)


@pytest.mark.parametrize("axes", [(), (3,), (2, 3)])
@pytest.mark.parametrize("T, S", [(1, 1), (5, 5), (1, 4), (2, 5)])
def test_attention_weights(axes, T, S):
    rng = np.random.default_rng(0)
    q, k = 2 * rng.normal(size=(*axes, T, 8)), 2 * rng.normal(size=(*axes, S, 8))
    found = np.array(train.attention_weights(mx.array(q), mx.array(k)))
    assert found.shape == (*axes, T, S)
    for t in range(T):
        seen = S - T + t + 1  # query t stands at position S - T + t and sees keys up to itself
        scores = (q[..., t : t + 1, :] * k[..., :seen, :]).sum(-1) / math.sqrt(8)
        assert np.abs(found[..., t, :seen] - reference.softmax(scores)).max() < 1e-5
        assert (found[..., t, seen:] == 0).all()


def test_models_of_different_sizes_equal_the_reference(tiny):
    tiny(ctx_len=3, n_emb=6, n_heads=3, n_layers=4)  # no model has anything of these
    models = [build(n_heads=1), build(n_heads=4, n_layers=1), build(n_heads=16, n_layers=3),
              build(ctx_len=30, n_emb=24, n_heads=3)]
    for model, weights in models:  # all exist side by side
        for T in (model.config.ctx_len, 7, 1):
            x = tokens(3, T)
            expected = reference.forward(weights, x, model.config.n_heads)
            found = np.array(model(mx.array(x)))
            assert found.shape == (3, T, V) and np.abs(expected).max() > 1
            assert np.abs(found - expected).max() < 2e-5


def test_no_logit_sees_a_later_token():
    model, _ = build()
    x = tokens(1, 12)
    logits = np.array(model(mx.array(x)))
    for t in range(12):
        other = x.copy()
        other[0, t] = (x[0, t] + 1) % V
        changed = np.abs(np.array(model(mx.array(other))) - logits)[0].max(-1)
        assert (changed[:t] == 0).all() and (changed[t:] > 1e-4).all()


def test_gradients_equal_finite_differences():
    model, weights = build(ctx_len=5, n_emb=8)
    x, y = tokens(2, 5), tokens(2, 5, seed=1)
    _, grads = nn.value_and_grad(model, train.loss_fn)(model, mx.array(x), mx.array(y))
    grads = dict(tree_flatten(grads))
    assert set(grads) == set(weights)
    rng = np.random.default_rng(0)
    for name, gradient in grads.items():
        direction = rng.normal(size=gradient.shape)

        def loss(nudge, name=name, direction=direction):
            return reference.loss({**weights, name: weights[name] + nudge * direction}, x, y, 2)

        expected = (loss(1e-5) - loss(-1e-5)) / 2e-5
        found = (np.array(gradient) * direction).sum()
        assert abs(found - expected) < 1e-5 + 1e-4 * abs(expected), name


def test_bias_of_the_keys_has_no_effect():
    model, _ = build()
    x = mx.array(tokens(2, 12))
    before = np.array(model(x))
    for block in model.blocks:
        block.mha.k_proj.bias = mx.random.normal((16,), key=mx.random.key(0))
    assert np.abs(np.array(model(x)) - before).max() < 2e-5
    model.blocks[0].mha.q_proj.bias = mx.random.normal((16,), key=mx.random.key(0))
    assert np.abs(np.array(model(x)) - before).max() > 1e-2  # a bias of the queries has one


@pytest.mark.parametrize("n_layers", [1, 3])
def test_initial_weights(n_layers):
    mx.random.seed(0)
    model = train.GPT(train.GPTConfig(65, 64, 128, 4, n_layers, 0.0))
    for name, weight in tree_flatten(model.parameters()):
        w = np.array(weight)
        if w.ndim == 1:
            assert (w == (0 if name.endswith("bias") else 1)).all(), name
        else:
            std = 0.02 / math.sqrt(2 * n_layers) if name.endswith("c_proj.weight") else 0.02
            assert abs(w.std() / std - 1) < 0.04 and abs(w.mean()) < 0.05 * std, name
    x, y = (mx.random.randint(0, 65, (4, 64), key=mx.random.key(seed)) for seed in (1, 2))
    assert abs(train.loss_fn(model, x, y).item() - math.log(65)) < 0.05


@pytest.mark.parametrize("sizes", [(11, 12, 16, 2), (65, 48, 56, 1), (65, 128, 128, 3)])
def test_names_shapes_and_number_of_parameters(sizes):
    vocab_size, ctx_len, n_emb, n_layers = sizes
    model = train.GPT(train.GPTConfig(vocab_size, ctx_len, n_emb, 8, n_layers, 0.0))
    found = {name: weight.shape for name, weight in tree_flatten(model.parameters())}
    assert found == reference.shapes(*sizes)
    assert train.count_parameters(model) == reference.count_parameters(*sizes)


def test_dropout_acts_in_training_only():
    model, weights = build(dropout=0.5)
    x = tokens(2, 12)
    expected = reference.forward(weights, x, 2)
    mx.random.seed(0)
    model.train()
    assert not mx.array_equal(model(mx.array(x)), model(mx.array(x)))
    model.eval()
    assert np.abs(np.array(model(mx.array(x))) - expected).max() < 2e-5


@pytest.mark.parametrize("place", ["dropout", "blocks.1.mha.attn_dropout",
                                   "blocks.1.mha.resid_dropout", "blocks.1.mlp.dropout"])
def test_dropout_is_where_gpt_2_has_it(place):
    mx.random.seed(0)
    model, _ = build(dropout=0.5)
    dict(model.named_modules())[place].train()
    x = mx.array(tokens(2, 12))
    assert not mx.array_equal(model(x), model(x))


def test_more_than_ctx_len_tokens_are_refused():
    model, _ = build()
    with pytest.raises(ValueError, match="13.*12"):
        model(mx.array(tokens(1, 13)))
    caches = [train.KVCache() for _ in model.blocks]
    model(mx.array(tokens(1, 9)), caches)
    with pytest.raises(ValueError, match="13.*12"):
        model(mx.array(tokens(1, 4)), caches)
