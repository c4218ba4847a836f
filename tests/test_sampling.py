"""Section 9: drawing tokens, the KV cache, and generation, against the model itself."""

import mlx.core as mx
import numpy as np
import pytest
import train
from helpers import random_model, random_tokens, softmax

LOGITS = np.array([0.3, 2.0, -1.0, 1.1, 0.0])


@pytest.mark.parametrize("temperature, top_k", [(0, None), (0, 3), (1e-3, None), (5.0, 1)])
def test_sample_is_greedy(temperature, top_k):
    mx.random.seed(0)
    assert {train.sample(mx.array(LOGITS), temperature, top_k) for _ in range(30)} == {1}


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, 2), (3.0, 3), (1.0, 99)])
def test_frequencies_of_sample_are_those_of_softmax(temperature, top_k):
    kept = np.argsort(-LOGITS)[:top_k]
    p = np.zeros(5)
    p[kept] = softmax(LOGITS[kept] / temperature)
    n = 2000
    mx.random.seed(0)
    drawn = [train.sample(mx.array(LOGITS), temperature, top_k) for _ in range(n)]
    found = np.bincount(drawn, minlength=5) / n
    assert (np.abs(found - p) <= 4 * np.sqrt(p * (1 - p) / n)).all()  # 0 where p is 0


def test_parts_of_a_text_with_caches_equal_the_whole():
    model, x = random_model(), mx.array(random_tokens(2, 12))
    expected = np.array(model(x))
    caches = [train.KVCache() for _ in model.blocks]
    for start, end in ((0, 4), (4, 5), (5, 12)):
        logits = np.array(model(x[:, start:end], caches))
        assert np.abs(logits - expected[:, start:end]).max() < 2e-5


@pytest.fixture
def seen(monkeypatch):
    """What generate() gives to sample(), in order."""
    seen, sample = [], train.sample

    def noting(*given, **named):
        seen.append([*given, *named.values()])
        return sample(*given, **named)

    monkeypatch.setattr(train, "sample", noting)
    return seen


@pytest.mark.parametrize("ctx_len", [1, 2, 7, 12])
@pytest.mark.parametrize("length", [1, 5, 13, 40])
def test_generate_equals_running_the_whole_window(seen, ctx_len, length):
    model, prompt = random_model(ctx_len=ctx_len), random_tokens(length).tolist()
    made = []
    for token in train.generate(model, prompt, 25, 0.7, 9):
        made.append(token)
        assert len(seen) == len(made)  # it works when it is asked, one token at a time
    assert len(made) == 25
    window = prompt[-ctx_len:]
    for (logits, *settings), token in zip(seen, made, strict=True):
        expected = model(mx.array([window]))[0, -1]
        assert mx.abs(logits - expected).max().item() < 2e-5
        assert settings == [0.7, 9] and type(token) is int
        window = [*window, token]
        if len(window) > ctx_len:  # it starts over with the newer half
            window = window[-max(1, ctx_len // 2) :]


def test_each_token_is_read_once_at_the_offset_before_the_update(monkeypatch):
    """Rotary embeddings would take the positions of new tokens from there."""
    reads, update = [], train.KVCache.update_and_fetch

    def noting(cache, k, v):
        reads.append((cache.offset, k.shape[2]))
        return update(cache, k, v)

    monkeypatch.setattr(train.KVCache, "update_and_fetch", noting)
    model = random_model(n_layers=3)
    list(train.generate(model, [1, 2, 3], 20))
    # 3 tokens of prompt and 9 more fill the 12 positions. Then 6 are read again, and so on.
    full, half = [(n, 1) for n in range(3, 12)], [(n, 1) for n in range(6, 12)]
    passes = [(0, 3), *full, (0, 6), *half, (0, 6), *half[:2]]
    assert reads == [read for read in passes for _ in model.blocks]


def test_generate_turns_dropout_off():
    model, prompt = random_model(dropout=0.5), random_tokens(5).tolist()
    greedy = mx.argmax(model(mx.array([prompt]))[0, -1]).item()
    model.train()
    assert [next(train.generate(model, prompt, 1, 0)) for _ in range(9)] == [greedy] * 9
    assert not any(part.training for part in model.modules())
