"""Section 9: drawing tokens, the KV cache, and generation, against the model itself."""

import mlx.core as mx
import numpy as np
import pytest
import reference
import train
from helpers import random_model, random_tokens

LOGITS = np.array([0.3, 2.0, -1.0, 1.1, 0.0])


@pytest.mark.parametrize("temperature, top_k", [
    (0, None), (0, 3), (1e-3, None), (5.0, 1), (1.0, None), (0.5, 2), (3.0, 3), (1.0, 99)])
def test_frequencies_of_sample_are_those_of_softmax(temperature, top_k):
    kept = np.argsort(-LOGITS)[:top_k]
    p = np.zeros(5)
    p[kept] = reference.softmax(LOGITS[kept] / max(temperature, 1e-3))
    n = 2000
    mx.random.seed(0)
    drawn = [train.sample(mx.array(LOGITS), temperature, top_k) for _ in range(n)]
    found = np.bincount(drawn, minlength=5) / n
    assert (np.abs(found - p) <= 4 * np.sqrt(p * (1 - p) / n) + 1e-9).all()  # 0 where p is 0


@pytest.mark.parametrize("ctx_len", [1, 2, 7, 12])
@pytest.mark.parametrize("length", [1, 5, 13, 40])
def test_generate_equals_running_the_whole_window(watch, ctx_len, length):
    model, prompt = random_model(ctx_len=ctx_len, dropout=0.5), random_tokens(length).tolist()
    model.train()
    samples = watch(train, "sample")
    for made, _ in enumerate(train.generate(model, prompt, 25, 0.7, 9), 1):
        assert len(samples) == made  # it works when it is asked, one token at a time
    assert len(samples) == 25 and not any(part.training for part in model.modules())
    window = prompt[-ctx_len:]
    for logits, *settings, token in samples:
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
