"""Sections 6 to 8: attention and the model, against the reference; and the guard on the mask.

After an edit of the model these tests fail, and rightly: the reference is GPT-2.
"""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
import train
from helpers import SOURCE, TINY, edited, module_from, named, random_model, random_tokens
from helpers import with_settings


def test_models_of_different_sizes_equal_the_reference(tiny):
    tiny(ctx_len=3, n_emb=6, n_heads=3, n_layers=4)  # no model has anything of these
    models = [random_model(n_heads=1), random_model(n_heads=4, n_layers=1),
              random_model(n_heads=16, n_layers=3), random_model(ctx_len=30, n_emb=24, n_heads=3)]
    for model in models:  # all exist side by side
        for T in (model.config.ctx_len, 7, 1):
            x = random_tokens(3, T)
            expected = reference.forward(named(model.parameters()), x, model.config.n_heads)
            found = np.array(model(mx.array(x)))
            assert found.shape == (3, T, 11) and np.abs(expected).max() > 1
            assert np.abs(found - expected).max() < 2e-5


def test_gradients_equal_finite_differences():
    model = random_model(ctx_len=5, n_emb=8)
    x, y = random_tokens(2, 5), random_tokens(2, 5, seed=1)
    _, grads = nn.value_and_grad(model, train.loss_fn)(model, mx.array(x), mx.array(y))
    weights, rng = named(model.parameters()), np.random.default_rng(0)
    assert named(grads).keys() == weights.keys()
    for name, gradient in named(grads).items():
        direction = rng.normal(size=gradient.shape)
        higher, lower = (
            reference.loss({**weights, name: weights[name] + nudge * direction}, x, y, 2)
            for nudge in (1e-5, -1e-5))
        expected = (higher - lower) / 2e-5
        assert abs((gradient * direction).sum() - expected) < 1e-5 + 1e-4 * abs(expected), name


@pytest.mark.parametrize("n_layers", [1, 3])
def test_names_shapes_and_initial_values_of_the_parameters(n_layers):
    mx.random.seed(0)
    model = train.GPT(train.GPTConfig(65, 64, 128, 4, n_layers, 0.0))
    weights = named(model.parameters())
    assert {name: w.shape for name, w in weights.items()} == reference.shapes(65, 64, 128, n_layers)
    assert train.count_parameters(model) == sum(w.size for w in weights.values())
    for name, w in weights.items():
        if w.ndim == 1:
            assert (w == (0 if name.endswith("bias") else 1)).all(), name
        else:
            std = 0.02 / math.sqrt(2 * n_layers) if name.endswith("c_proj.weight") else 0.02
            assert abs(w.std() / std - 1) < 0.04 and abs(w.mean()) < 0.05 * std, name


@pytest.mark.parametrize("place", ["dropout", "blocks.1.attn.attn_dropout",
                                   "blocks.1.attn.resid_dropout", "blocks.1.mlp.dropout"])
def test_dropout_is_where_gpt_2_has_it_and_acts_in_training(place):
    model = random_model(dropout=0.4)
    x, layer = mx.array(random_tokens(2, 12)), dict(model.named_modules())[place]
    assert mx.array_equal(model(x), model(x))
    layer.train()
    assert not mx.array_equal(model(x), model(x))
    assert abs(mx.mean(layer(mx.ones(10_000)) == 0).item() - 0.4) < 0.03


def test_more_than_ctx_len_tokens_are_refused():
    model = random_model()
    with pytest.raises(ValueError, match="13.*12"):
        model(mx.array(random_tokens(1, 13)))
    caches = [train.KVCache() for _ in model.blocks]
    model(mx.array(random_tokens(1, 9)), caches)
    with pytest.raises(ValueError, match="13.*12"):
        model(mx.array(random_tokens(1, 4)), caches)


@pytest.mark.parametrize("name", ["_mask", "tril", "bias"])
def test_constants_of_the_readers_own_begin_with_an_underscore(monkeypatch, name):
    class Own(train.MultiHeadAttention):
        def __init__(self, config):
            super().__init__(config)
            setattr(self, name, mx.tri(config.ctx_len))

    monkeypatch.setattr(train, "MultiHeadAttention", Own)
    if name == "_mask":
        assert mx.array_equal(random_model().blocks[0].attn[name], mx.tri(12))
    else:
        with pytest.raises(ValueError, match=rf"blocks\.0\.attn\.{name}\b.*12, 12.*_"):
            random_model()


def test_numbers_that_are_not_trained_keep_their_first_value(monkeypatch):
    """Such as the running mean of a BatchNorm that a reader adds."""
    class Own(train.MLP):
        def __init__(self, config):
            super().__init__(config)
            self.norm = nn.BatchNorm(config.n_emb)

    monkeypatch.setattr(train, "MLP", Own)
    model = train.GPT(train.GPTConfig(11, 12, 16, 2, 1, 0.0))
    assert mx.array_equal(model.blocks[0].mlp.norm.running_var, mx.ones(16))


# The guard on the mask

NO_MASK = (r"^ +scores = mx\.where\(causal_mask.*\n", "")
SPLIT = (r"x = x\.reshape\(B, T, -1, self\.head_size\)", "x = x.reshape(B, -1, T, self.head_size)")
UNSORTED = (r"return x\.transpose\(0, 2, 1, 3\)", "return x")
UNMERGED = (r"out = out\.transpose\(0, 2, 1, 3\)", "pass")
LATE, PAST = ((r"return j > i\b", f"return {other}") for other in ("j > i + 1", "j < i"))


@pytest.mark.parametrize(
    "edits", [[NO_MASK], [LATE], [PAST], [SPLIT, UNSORTED], [UNMERGED]],
    ids=["no mask", "one late", "of the past", "not split", "not merged"])
def test_the_guard_sees_a_model_that_sees_the_future(edits):
    module = module_from(edited(SOURCE, *edits))
    mx.random.seed(0)
    config = module.GPTConfig(11, ctx_len=12, n_emb=16, n_heads=4, n_layers=1, dropout=0.1)
    assert module.sees_the_future(module.GPT(config))


@pytest.mark.parametrize("sizes", [{}, dict(n_heads=1, n_layers=4), dict(ctx_len=1, n_heads=16)])
def test_the_guard_is_silent_on_an_honest_model(sizes):
    model = random_model(dropout=0.5, **sizes)
    model.train()
    assert not train.sees_the_future(model)


def test_a_run_without_a_mask_warns(folder, capsys):
    module_from(with_settings(edited(SOURCE, NO_MASK), **TINY)).train()
    assert capsys.readouterr().out.count("Warning: this model sees the future") == 3
