"""Section 10: drawing characters, and the key/value cache."""

import mlx.core as mx
import numpy as np
import pytest
import train
from mlx.utils import tree_flatten
from test_model import V, make

@pytest.fixture
def tiny(tiny):
    tiny(n_layers=2)
    return tiny


LOGITS = mx.array([0.3, 2.0, -1.0, 1.1, 0.0])


def frequencies(n, *arguments):
    mx.random.seed(0)
    return np.bincount([train.sample(LOGITS, *arguments) for _ in range(n)], minlength=5) / n


@pytest.mark.parametrize("temperature", [0, 1e-6, 1e-3])
def test_temperature_near_zero_is_greedy(temperature):
    assert frequencies(50, temperature)[1] == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_agree_with_softmax(temperature):
    p = np.exp(np.array(LOGITS) / temperature)
    p /= p.sum()
    n = 4000
    assert (np.abs(frequencies(n, temperature) - p) < 4 * np.sqrt(p * (1 - p) / n)).all()


def test_top_k_keeps_the_likeliest_and_their_proportions():
    assert set(np.flatnonzero(frequencies(500, 5.0, 3))) == {0, 1, 3}
    assert frequencies(100, 5.0, 1)[1] == 1
    p = np.exp([1.1, 2.0]) / np.exp([1.1, 2.0]).sum()
    assert np.allclose(frequencies(4000, 1.0, 2)[[3, 1]], p, atol=0.03)
    assert (frequencies(300, 5.0, 99) > 0).all()  # more than there are: all


def test_top_k_with_equal_logits_is_still_k():
    mx.random.seed(0)
    assert len({train.sample(mx.zeros(8), 1.0, 3) for _ in range(200)}) == 3


@pytest.fixture
def seen(monkeypatch):
    """The logits from which generate draws, in order."""
    seen, sample = [], train.sample

    def noting(logits, *settings):
        seen.append(np.array(logits))
        return sample(logits, *settings)

    monkeypatch.setattr(train, "sample", noting)
    return seen


@pytest.mark.parametrize("ctx_len", [1, 2, 7, 12])
@pytest.mark.parametrize("length", [1, 5, 12, 13, 40])
def test_cached_logits_equal_those_without_cache(tiny, seen, ctx_len, length):
    tiny(ctx_len=ctx_len)
    model = make(spread=0.2)
    prompt = np.random.default_rng(1).integers(0, V, length).tolist()
    mx.random.seed(0)
    made = list(model.generate(prompt, 30))
    assert len(made) == len(seen) == 30 and all(type(i) is int for i in made)
    window = prompt[-ctx_len:]
    for logits, token in zip(seen, made):
        whole = np.array(model(mx.array([window])))[0, -1]  # all of the window, every time
        assert np.abs(logits - whole).max() < 1e-4
        window = window + [token]
        if len(window) > ctx_len:
            window = window[-max(1, ctx_len // 2) :]


def test_generates_one_at_a_time(tiny, seen):
    generator = make().generate([1], 10**9)
    assert not seen
    for n in range(1, 30):
        next(generator)
        assert len(seen) == n


def test_each_new_token_is_one_forward_pass_of_one_token(tiny, monkeypatch):
    model, calls = make(), []
    forward = train.GPT.__call__
    monkeypatch.setattr(train.GPT, "__call__", lambda self, tokens, start=0: (
        calls.append((start, tokens.shape[1])), forward(self, tokens, start))[1])
    list(model.generate([1, 2, 3], 20))
    # 3 tokens of prompt, 9 more fill the 12 positions; then 6 are read again, and so on
    full, half = [(n, 1) for n in range(3, 12)], [(n, 1) for n in range(6, 12)]
    assert calls == [(0, 3), *full, (0, 6), *half, (0, 6), *half[:2]]


def test_generation_is_without_dropout_and_reproducible(tiny):
    tiny(dropout=0.5)
    model = make(spread=0.2)
    texts = []
    for training in (True, False):
        model.train(training)
        mx.random.seed(1)
        texts.append(list(model.generate([1], 50)))
        assert all(part.training == training for part in model.modules())  # it stays as it was
    assert texts[0] == texts[1]
    mx.random.seed(2)
    assert list(model.generate([1], 50)) != texts[0]


def test_generation_leaves_the_model_as_it_was(tiny):
    model = make(spread=0.2)
    x = mx.array([[1, 2, 3]])
    names, logits = [name for name, _ in model.named_modules()], np.array(model(x))
    parameters = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    list(model.generate([1, 2], 30))
    half_way = model.generate([1, 2], 30)
    next(half_way)
    assert [name for name, _ in model.named_modules()] == names
    assert (np.array(model(x)) == logits).all() and (np.array(model(x)) == logits).all()
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == parameters.keys()
    assert all((np.array(after[name]) == parameters[name]).all() for name in parameters)


def test_two_generators_do_not_disturb_each_other(tiny):
    model, prompts = make(spread=0.2), ([1, 2, 3], [4, 5, 6, 7, 8])
    alone = [list(model.generate(prompt, 30, temperature=0)) for prompt in prompts]
    pairs = zip(*(model.generate(prompt, 30, temperature=0) for prompt in prompts))
    assert [list(one) for one in zip(*pairs)] == alone and alone[0] != alone[1]
    assert prompts == ([1, 2, 3], [4, 5, 6, 7, 8])  # nor what they are given


def test_remembering_attention_equals_attention(tiny):
    attention = train.MultiHeadAttention()
    x = mx.random.normal((2, 9, 16))
    whole = np.array(attention(x))
    train.remember(attention)
    parts = [np.array(attention(x[:, start:end])) for start, end in ((0, 4), (4, 5), (5, 9))]
    assert np.abs(np.concatenate(parts, axis=1) - whole).max() < 1e-5


def test_model_learns_and_writes_a_cycle(tiny):
    tiny(num_epochs=8, ctx_len=8, n_layers=1)
    tokens = np.arange(330) % V
    mx.random.seed(0)
    model = train.GPT(V)
    optimizer = train.make_optimizer(8 * train.count_batches(tokens, 4))
    losses = [val for _, _, val in train.train(model, optimizer, tokens, tokens[:50])]
    assert losses[-1] < 0.2
    assert list(model.generate([4], 40, temperature=0)) == [(5 + i) % V for i in range(40)]
