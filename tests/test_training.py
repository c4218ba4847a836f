"""Section 9: the optimizer against one written in NumPy, the schedule, evaluation, the loop."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import train
from conftest import EXACT, TEXT
from mlx.utils import tree_flatten
from test_model import numpy_loss

V = 11


@pytest.fixture
def tiny(tiny):
    tiny(n_layers=2)
    return tiny


def setup(n=300):
    """A model, an optimizer for a whole run, and random tokens to train and validate on."""
    tokens = np.random.default_rng(5).integers(0, V, n)
    mx.random.seed(3)
    model = train.GPT(V)
    optimizer = train.make_optimizer(
        train.num_epochs * train.count_batches(tokens, train.batch_size))
    optimizer.init(model.trainable_parameters())
    return model, optimizer, tokens, np.random.default_rng(6).integers(0, V, 110)


def decays(name):
    """The rule, by name and not by shape: the weights of the linear layers."""
    return name.endswith(("_proj.weight", "c_fc.weight", "lm_head.weight"))


def test_training_equals_adamw_in_numpy(tiny, monkeypatch):
    tiny(num_epochs=2, max_norm=0.3, weight_decay=0.5, beta1=0.8, beta2=0.95)
    model, optimizer, tokens, val = setup()
    batches = [list(train.get_batches(tokens, 4, shuffle=True)) for _ in range(2)]
    epochs = iter(batches)
    get_batches = train.get_batches
    monkeypatch.setattr(train, "get_batches", lambda tokens, size, shuffle: next(epochs) if shuffle
                        else get_batches(tokens, size, shuffle))
    total = 2 * train.count_batches(tokens, 4)
    w = {n: np.array(p, dtype=np.float64) for n, p in tree_flatten(model.parameters())}
    m = {n: np.zeros_like(p) for n, p in w.items()}
    v = {n: np.zeros_like(p) for n, p in w.items()}
    twin, losses, expected, clipped, t = train.GPT(V), [], [], 0, 0
    for epoch in batches:
        for x, y in epoch:
            twin.load_weights([(n, mx.array(p.astype(np.float32))) for n, p in w.items()])
            loss, grads = nn.value_and_grad(twin, train.loss_fn)(twin, x, y)
            losses.append(loss.item())
            g = {n: np.array(p, dtype=np.float64) for n, p in tree_flatten(grads)}
            norm = math.sqrt(sum((p**2).sum() for p in g.values()))
            clipped += norm > 0.3
            t += 1
            lr = 1e-2 * min(1, t / 3) * (1 - (t - 1) / total)
            for n in w:
                gradient = g[n] * min(1, 0.3 / norm)
                m[n] = 0.8 * m[n] + 0.2 * gradient
                v[n] = 0.95 * v[n] + 0.05 * gradient**2
                step = m[n] / (1 - 0.8**t) / (np.sqrt(v[n] / (1 - 0.95**t)) + 1e-8)
                w[n] -= lr * (step + (0.5 * w[n] if decays(n) else 0))
        # A piece of the training text, half as long as val, and val, both at the epoch's end.
        seen = tokens[: len(val) // 2 + 12]
        expected.append([numpy_loss(w.items(), part, 12, 2) for part in (seen, val)])
    assert t == total and 0 < clipped
    watched = []
    reported = list(train.train(model, optimizer, tokens, val,
                                watch=lambda loss: watched.append(loss.item())))
    for n, p in tree_flatten(model.parameters()):
        assert np.abs(np.array(p) - w[n]).max() < 1e-4, n
    assert [epoch for epoch, _, _ in reported] == [0, 1]
    assert np.allclose([pair for _, *pair in reported], expected, atol=1e-5)
    assert np.allclose(watched, losses, atol=1e-5)


def test_decay_reaches_linear_weights_only(tiny):
    tiny(weight_decay=0.5, warmup_steps=0, lr=0.1)
    model, optimizer, _, _ = setup()
    before = {n: np.array(p) for n, p in tree_flatten(model.parameters())}
    _, nothing = nn.value_and_grad(model, lambda m: mx.array(0.0) * m.lm_head.bias.sum())(model)
    optimizer.update(model, nothing)
    for n, p in tree_flatten(model.parameters()):
        expected = before[n] * (1 - 0.1 * 0.5) if decays(n) else before[n]
        assert np.allclose(np.array(p), expected, rtol=1e-6, atol=0), n
    assert sum(decays(n) for n in before) == train.n_layers * 6 + 1


@pytest.mark.parametrize("warmup", [0, 1, 5, 100])
def test_learning_rate(tiny, warmup):
    tiny(warmup_steps=warmup, lr=0.02)
    model, _, _, _ = setup()
    optimizer = train.make_optimizer(20)
    _, nothing = nn.value_and_grad(model, lambda m: mx.array(0.0) * m.lm_head.bias.sum())(model)
    for i in range(22):  # two more than it was made for
        optimizer.update(model, nothing)
        expected = 0.02 * (min(1, (i + 1) / warmup) if warmup else 1) * max(0, 20 - i) / 20
        for part in optimizer.state["states"]:
            assert abs(part["learning_rate"].item() - expected) < 1e-7


@pytest.mark.parametrize("rows", [3, 4, 6])
def test_streams_share_a_batch(tiny, rows):
    tiny(batch_size=rows)
    model, _, _, _ = setup()
    x, y = mx.random.randint(0, V, (2, rows, 12))
    expected, grads = nn.value_and_grad(model, train.loss_fn)(model, x, y)
    loss, found = nn.value_and_grad(model, train.shared_loss)(model, x, y)
    assert abs(loss.item() - expected.item()) < 1e-6
    for (n, a), (_, b) in zip(tree_flatten(found), tree_flatten(grads)):
        assert mx.abs(a - b).max() < 1e-6, n


@pytest.mark.parametrize("n", [13, 12 * 9 + 6])  # one row; batches of 4, 4 and 1 rows, and a rest
def test_evaluate_is_the_mean_over_all_rows(tiny, n):
    tiny(dropout=0.5)
    model, _, _, _ = setup()
    tokens = np.random.default_rng(0).integers(0, V, n)
    expected = numpy_loss(tree_flatten(model.parameters()), tokens, 12, 2)
    model.train()
    assert abs(train.evaluate(model, tokens) - expected) < 1e-5


def test_overfits_one_batch(tiny):
    tiny(weight_decay=0.0)
    model, _, tokens, _ = setup()
    optimizer = train.make_optimizer(120)
    x, y = next(train.get_batches(tokens, 4, shuffle=True))
    losses = []
    for _ in range(120):
        loss, grads = nn.value_and_grad(model, train.loss_fn)(model, x, y)
        optimizer.update(model, grads)
        losses.append(loss.item())
    assert abs(losses[0] - math.log(V)) < 0.1 and losses[-1] < 0.05


def run():
    return list(train.train(*setup()))


def same(one, other):
    """Whether two lists of losses are equal: on a CPU to the last bit."""
    return one == other if EXACT else np.allclose(one, other, atol=1e-3)


def test_same_seed_same_losses(tiny):
    tiny(dropout=0.3)
    first = run()
    assert same(run(), first)
    tiny(seed=1)
    assert not np.allclose(run(), first, atol=2e-3)


def test_each_epoch_has_its_own_order(tiny, monkeypatch):
    tiny(num_epochs=3)
    first, get_batches = [], train.get_batches

    def noting(tokens, size, shuffle):
        batches = list(get_batches(tokens, size, shuffle))
        if shuffle:
            first.append(np.array(batches[0][0]).tobytes())
        return batches

    monkeypatch.setattr(train, "get_batches", noting)
    run()
    assert len(set(first)) == 3


def test_each_epoch_has_its_own_dropout(tiny, monkeypatch):
    tiny(dropout=0.3, lr=1e-12, num_epochs=3)
    batch, get_batches = next(train.get_batches(np.arange(300) % V, 4, True)), train.get_batches
    monkeypatch.setattr(train, "get_batches", lambda tokens, size, shuffle: [batch] if shuffle
                        else get_batches(tokens, size, shuffle))
    losses = []
    list(train.train(*setup(), watch=lambda loss: losses.append(round(loss.item(), 5))))
    assert len(losses) == len(set(losses)) == 3


def test_training_can_begin_at_a_later_epoch(tiny):
    tiny(num_epochs=5)
    model, optimizer, tokens, val = setup()
    assert [epoch for epoch, _, _ in train.train(model, optimizer, tokens, val, 3)] == [3, 4]


def test_dropout_is_active_in_training_only(tiny):
    losses = []
    for dropout in (0.0, 0.5):
        tiny(dropout=dropout, lr=1e-12)
        steps = []
        reported = list(train.train(*setup(), watch=lambda loss: steps.append(loss.item())))
        losses.append((steps, [pair for _, *pair in reported]))
    (quiet, before), (noisy, after) = losses
    assert len(quiet) == len(noisy) == 2 * 6
    assert all(abs(a - b) > 1e-5 for a, b in zip(quiet, noisy))  # in both epochs
    assert np.abs(np.array(before) - after).max() < 1e-6  # both losses are measured without


def of_text(before=lambda model: None, between=lambda model: None, during=lambda model: None,
            called=lambda x: None):
    """A training on TEXT, into which a user breaks: its losses, and those of all its steps."""
    shared_loss = train.shared_loss  # as a run does
    tokenizer = train.CharTokenizer(TEXT)
    parts = train.split(np.array(tokenizer.encode(TEXT), dtype=np.int32))
    mx.random.seed(train.seed)
    model = train.GPT(tokenizer.vocab_size)
    steps = train.count_batches(parts[0], train.batch_size)
    optimizer = train.make_optimizer(train.num_epochs * steps)
    optimizer.init(model.trainable_parameters())
    losses, watched = [], []

    def watch(loss):
        watched.append(loss.item())
        during(model)

    def loss_fn(model, x, y):
        if model.training:  # evaluate uses it, too
            called(x)
        return shared_loss(model, x, y)

    before(model)
    for _, *pair in train.train(model, optimizer, *parts, loss_fn=loss_fn, watch=watch):
        losses += pair
        between(model)
    assert len(watched) == train.num_epochs * steps
    return losses + watched


def test_writing_does_not_disturb_training(compiled):
    """Compiled, as the recording freezes what it finds: dropout switched off, for example."""
    undisturbed = of_text()
    assert same(of_text(before=lambda model: list(model.generate([1], 20)),
                        between=lambda model: list(model.generate([1], 20))), undisturbed)
    assert same(of_text(before=lambda model: model.eval()), undisturbed)
    assert same(of_text(during=lambda model: list(model.generate([1], 1, temperature=0))),
                undisturbed)


def test_compiled_or_not_the_losses_are_the_same(compiled):
    calls = []
    losses = of_text(called=lambda x: calls.append(len(x)))
    assert calls == [4]  # Python runs once, for the recording
    mx.disable_compile()
    assert np.allclose(of_text(called=lambda x: calls.append(len(x))), losses, atol=2e-3)
    assert len(calls) > 10
