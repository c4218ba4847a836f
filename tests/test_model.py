"""Sections 6 to 8: attention and the model, against the reference; and the guard on the mask.

After an edit of the model these tests fail, and rightly: the reference is GPT-2.
"""

import doctest
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
import train
from helpers import SOURCE, TEXT, TINY, edited, module_from, random_model, with_settings
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


def test_the_bias_of_the_keys_has_no_effect():
    model = random_model()
    x = mx.array(tokens(2, 12))
    before = model(x)
    for part, most in ((model.blocks[0].attn.k_proj, 2e-5), (model.blocks[0].attn.q_proj, 10)):
        part.bias = mx.random.normal((16,), key=mx.random.key(0))
        assert most / 1e3 < mx.abs(model(x) - before).max().item() + 1e-8 < most


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


@pytest.mark.parametrize("place", ["dropout", "blocks.1.attn.attn_dropout",
                                   "blocks.1.attn.resid_dropout", "blocks.1.mlp.dropout"])
def test_dropout_is_where_gpt_2_has_it_and_acts_in_training(place):
    model = random_model(dropout=0.4)
    x, layer = mx.array(tokens(2, 12)), dict(model.named_modules())[place]
    assert mx.array_equal(model(x), model(x))
    layer.train()
    assert not mx.array_equal(model(x), model(x))
    assert abs(mx.mean(layer(mx.ones(10_000)) == 0).item() - 0.4) < 0.03


def test_more_than_ctx_len_tokens_are_refused():
    model = random_model()
    with pytest.raises(ValueError, match="13.*12"):
        model(mx.array(tokens(1, 13)))
    caches = [train.KVCache() for _ in model.blocks]
    model(mx.array(tokens(1, 9)), caches)
    with pytest.raises(ValueError, match="13.*12"):
        model(mx.array(tokens(1, 4)), caches)


# Layers of a reader's own


@pytest.mark.parametrize("name", ["_mask", "tril", "bias"])
def test_constants_begin_with_an_underscore(monkeypatch, name):
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


def test_layers_with_numbers_that_are_not_trained(monkeypatch):
    """BatchNorm's running mean, for example, keeps the value that it begins with."""
    class Own(train.MLP):
        def __init__(self, config):
            super().__init__(config)
            self.norm, self.act = nn.BatchNorm(config.n_emb), nn.PReLU()

    monkeypatch.setattr(train, "MLP", Own)
    model = train.GPT(train.GPTConfig(V, 12, 16, 2, 1, 0.0))
    assert mx.array_equal(model.blocks[0].mlp.norm.running_var, mx.ones(16))
    assert mx.array_equal(model.blocks[0].mlp.act(mx.array([-2.0])), mx.array([-2.0]))


# The guard on the mask

NO_MASK = (r"^ +scores = mx\.where\(causal_mask.*\n", "")
SPLIT = (r"x = x\.reshape\(B, T, -1, self\.head_size\)", "x = x.reshape(B, -1, T, self.head_size)")
UNSORTED = (r"return x\.transpose\(0, 2, 1, 3\)", "return x")
UNMERGED = (r"out = out\.transpose\(0, 2, 1, 3\)", "pass")
MIXED = [(SPLIT[0], "x = x.reshape(B, self.head_size, T, -1)"),
         (UNSORTED[0], "return x.transpose(0, 3, 2, 1)")]
LATE, PAST = ((r"return j > i\b", f"return {other}") for other in ("j > i + 1", "j < i"))


@pytest.mark.parametrize(
    "edits", [[NO_MASK], [LATE], [PAST], [SPLIT, UNSORTED], [UNMERGED], MIXED],
    ids=["no mask", "one late", "of the past", "not split", "not merged", "mixed"])
def test_the_guard_sees_a_model_that_sees_the_future(edits):
    module = module_from(edited(SOURCE, *edits))
    mx.random.seed(0)
    config = module.GPTConfig(V, ctx_len=12, n_emb=16, n_heads=4, n_layers=1, dropout=0.1)
    assert module.sees_the_future(module.GPT(config))


@pytest.mark.parametrize("sizes", [{}, dict(n_heads=1, n_layers=4), dict(ctx_len=1, n_heads=16)])
def test_the_guard_is_silent_on_an_honest_model(sizes):
    assert not train.sees_the_future(random_model(dropout=0.5, **sizes))


@pytest.mark.parametrize("function, edits", [
    ("causal_mask", [(LATE[0], "return j >= i")]),  # one early: nan
    ("forward_pass", [SPLIT, UNSORTED, UNMERGED])])  # causal, but not GPT-2
def test_a_doctest_sees_what_the_guard_cannot(function, edits):
    module = module_from(edited(SOURCE, *edits))
    [test] = doctest.DocTestFinder().find(getattr(module, function), globs=vars(module))
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda _: None).failed > 0


def test_a_run_without_a_mask_warns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text(TEXT, encoding="utf-8")
    module_from(with_settings(edited(SOURCE, NO_MASK), **TINY)).train()
    assert capsys.readouterr().out.count("Warning: this model sees the future") == 3
