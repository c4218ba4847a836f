"""Sections 5 and 9: the loss, the optimizer and its step against the reference; two cores."""

import inspect
import math
import os
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
import train
from conftest import ON_CPU
from mlx.utils import tree_flatten
from test_model import V, build, tokens


def arrays(tree):
    """The arrays of a tree by name, in NumPy and float64."""
    return {name: np.array(array, dtype=np.float64) for name, array in tree_flatten(tree)}


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_loss_on_one_core_and_on_two(rows):
    model, weights = build()
    x, y = tokens(rows, 12), tokens(rows, 12, seed=1)
    gradients = []
    for loss_fn in (train.loss_fn, train.two_core_loss):
        loss, grads = nn.value_and_grad(model, loss_fn)(model, mx.array(x), mx.array(y))
        assert loss.shape == () and abs(loss.item() - reference.loss(weights, x, y, 2)) < 1e-5
        gradients.append(arrays(grads))
    one, two = gradients  # those of loss_fn are compared with the reference in test_model.py
    assert all(np.abs(one[name] - two[name]).max() < 1e-5 for name in one)


def test_two_cores_are_for_machines_without_a_gpu(monkeypatch):
    monkeypatch.delenv("MLX_BFS_MAX_WIDTH", raising=False)
    assert train.choose_loss_fn() is (train.two_core_loss if ON_CPU else train.loss_fn)
    monkeypatch.setenv("MLX_BFS_MAX_WIDTH", "20")
    train.choose_loss_fn()
    assert os.environ["MLX_BFS_MAX_WIDTH"] == "20"  # a reader's own value stays


@pytest.mark.parametrize("name", ["loss_fn", "two_core_loss"])
@pytest.mark.parametrize("n", [13, 12 * 9 + 6])  # one row; batches of 4, 4, and 1 rows and a rest
def test_evaluate_is_the_mean_over_all_tokens(tiny, name, n):
    model, weights = build(dropout=0.5)
    model.train()
    text = tokens(n)
    found = train.evaluate(model, text, getattr(train, name))
    rows = (n - 1) // 12
    x, y = (text[start : start + 12 * rows].reshape(rows, 12) for start in (0, 1))
    assert abs(found - reference.loss(weights, x, y, 2)) < 1e-5
    assert not any(part.training for part in model.modules())


# To test the step alone, a loss whose gradients are known: every parameter has a slope.


def slopes(model):
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=w.shape) for name, w in tree_flatten(model.parameters())}


def toy_loss(model, x, y):
    """x times the sum of all parameters times their slopes, and y times a random number."""
    c = slopes(model)
    total = sum((w * mx.array(c[name])).sum() for name, w in tree_flatten(model.parameters()))
    return x * total + y * mx.random.uniform()


def is_decayed(name):
    """By name and not by shape: the matrices of the blocks."""
    return name.endswith(("_proj.weight", "c_fc.weight"))


@pytest.fixture
def compiled():
    """Compiles for one test. conftest.py has turned it off, as compilers take their time."""
    calls = []

    def double(x):
        calls.append(x)
        return x + x

    mx.enable_compile()
    try:
        function = mx.compile(double)
        for _ in range(5):
            mx.eval(function(mx.array(1.0)))
        if len(calls) == 5:
            pytest.skip("MLX finds no compiler, and runs the Python code each time")
        yield
    finally:
        mx.disable_compile()


def new_step(total_steps, loss_fn=toy_loss):
    """A small model, and a step that trains it on a loss."""
    model, _ = build(ctx_len=3, n_emb=4, n_heads=1, n_layers=1)
    optimizer = train.make_optimizer(total_steps)
    optimizer.init(model.trainable_parameters())
    return model, train.make_step(model, optimizer, loss_fn)


SETTINGS = dict(lr=0.05, warmup_steps=3, weight_decay=0.5, beta1=0.8, beta2=0.95, max_norm=1.0)


def check_steps(model, step, total_steps):
    """Compares total_steps steps, and two more, with those of the reference under SETTINGS."""
    w, c = arrays(model.parameters()), slopes(model)
    adamw = {name: reference.AdamW(0.8, 0.95, 0.5 if is_decayed(name) else 0.0) for name in w}
    for t in range(total_steps + 2):
        x = [0.02, -0.5, 0.1, 2.0, -0.05, 0.01][t % 6]  # some gradients are to be clipped
        loss = step(mx.array(x), mx.array(0.0))
        assert abs(loss.item() - x * sum((w[name] * c[name]).sum() for name in w)) < 1e-4
        gradients = reference.clip({name: x * c[name] for name in w}, 1.0)
        lr = 0.05 * min(1, (t + 1) / 3, max(0, 1 - t / total_steps))
        for name, found in arrays(model.parameters()).items():
            w[name] = adamw[name].step(w[name], gradients[name], lr)
            assert np.abs(found - w[name]).max() < 1e-5, (t, name)


def test_steps_equal_those_of_the_reference(tiny):
    tiny(**SETTINGS)
    check_steps(*new_step(14), 14)


def test_compiled_step(tiny, compiled):
    traced = []

    def counted_loss(*arguments):
        traced.append(arguments)
        return toy_loss(*arguments)

    tiny(**SETTINGS)
    model, step = new_step(6, counted_loss)
    check_steps(model, step, 6)
    assert len(traced) <= 2  # MLX records the first function of a process twice
    for seed in (0, 1, 0):
        mx.random.seed(seed)
        losses = [step(mx.array(0.0), mx.array(1.0)).item() for _ in range(3)]
        mx.random.seed(seed)
        assert losses == [mx.random.uniform().item() for _ in range(3)]  # not a recorded number


def rates(optimizer, steps):
    """The learning rates of both parts of the optimizer in the first steps."""
    model, _ = build(ctx_len=3, n_emb=4)
    found = []
    for _ in range(steps):
        optimizer.update(model, model.parameters())  # any gradients will do
        found.append([part["learning_rate"].item() for part in optimizer.state["states"]])
    return np.array(found)


@pytest.mark.parametrize("warmup", [0, 1, 5, 100])
def test_learning_rate(tiny, warmup):
    tiny(warmup_steps=warmup, lr=0.02)
    found = rates(train.make_optimizer(20), 22)  # two more than it is made for
    for step, both in enumerate(found):
        rise = min(1, (step + 1) / warmup) if warmup else 1
        assert np.abs(both - 0.02 * min(rise, max(0, 1 - step / 20))).max() < 1e-8, step


@pytest.mark.parametrize("line, schedule", [
    ("return lr", lambda step: min(1, (step + 1) / 4)),
    ("fall =", lambda step: min((step + 1) / 4, (1 + math.cos(math.pi * step / 20)) / 2))])
def test_other_schedules_as_the_comment_says(tiny, line, schedule):
    """A constant rate, and half a cosine wave."""
    source = inspect.getsource(train.make_optimizer)
    advice = re.search(rf"# .*({line} .*)\n", source)
    if not advice:
        pytest.skip(f"make_optimizer has no comment that tells to write {line}")
    tiny(lr=0.02, warmup_steps=4)
    names = dict(vars(train))
    exec(re.sub(rf"^ +{line} .*\n", f"        {advice[1]}\n", source, count=1, flags=re.M), names)
    found = rates(names["make_optimizer"](20), 22)  # two more than it is made for
    for step, both in enumerate(found):
        assert np.abs(both - 0.02 * schedule(step)).max() < 1e-8, step


def test_training_lowers_the_loss(tiny):
    tiny(weight_decay=0.0)
    text = np.arange(300) % V
    mx.random.seed(0)
    model = train.GPT(train.GPTConfig(V, 12, 16, 2, 1, 0.0))
    optimizer = train.make_optimizer(100)
    step = train.make_step(model, optimizer, train.loss_fn)
    assert abs(train.evaluate(model, text, train.loss_fn) - math.log(V)) < 0.1
    for epoch in range(20):
        for x, y in train.get_batches(text, 12, 4, np.random.default_rng(epoch)):
            step(x, y)
    assert train.evaluate(model, text, train.loss_fn) < 0.1


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_differs_from_step_to_step(tiny, dropout):
    tiny(lr=0.0)
    mx.random.seed(0)
    model, _ = build(dropout=dropout)
    model.train()
    step = train.make_step(model, train.make_optimizer(10), train.loss_fn)
    x, y = mx.array(tokens(4, 12)), mx.array(tokens(4, 12, seed=1))
    losses = {step(x, y).item() for _ in range(3)}
    assert len(losses) == (3 if dropout else 1)
