"""Sections 2 to 4: the text and the batches. (The tokenizer has its doctest.)"""

import numpy as np
import pytest
import train


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\r"])
def test_load_text_knows_line_ends_and_byte_order_mark(tmp_path, ends):
    file = tmp_path / "text"
    file.write_bytes(b"\xef\xbb\xbf" + ends.join([b"one", "zwölf 🌙".encode(), b"three"]))
    assert train.load_text(file) == "one\nzwölf 🌙\nthree"


T, B = 12, 4


def batches_of(tokens, rng=None):
    """The batches as NumPy arrays."""
    return [(np.array(x), np.array(y)) for x, y in train.get_batches(tokens, T, B, rng)]


@pytest.mark.parametrize("n", [2, 12, 13, 24, 25, 60, 61, 500])
def test_batches(n):
    batches = batches_of(np.arange(n))
    used = (n - 1) // T * T  # every token but the first is a target once, as far as rows go
    assert [token for x, _ in batches for token in x.ravel()] == list(range(used))
    assert [token for _, y in batches for token in y.ravel()] == list(range(1, used + 1))
    assert all(x.shape == y.shape == (B, T) for x, y in batches[:-1])

    rng = np.random.default_rng(n)
    for _ in range(20):  # many random places to begin at
        batches = batches_of(np.arange(n), rng)
        assert len(batches) == max(0, train.count_batches(np.arange(n), T, B))
        assert all(x.shape == (B, T) and (np.diff(x) == 1).all() for x, _ in batches)
        assert all((y == x + 1).all() for x, y in batches)
        targets = [token for _, y in batches for token in y.ravel()]
        assert len(set(targets)) == len(targets)  # no token is a target twice
        assert n - len(targets) <= (B + 1) * T  # less than a batch and a row are left out


def test_random_batches_begin_everywhere_in_random_order():
    rng = np.random.default_rng(0)
    epochs = [np.concatenate([x[:, 0] for x, _ in batches_of(np.arange(74), rng)])
              for _ in range(300)]  # 4 of 5 rows each
    assert set(np.concatenate(epochs)) == set(range(5 * T))
    assert all(len(set(starts % T)) == 1 for starts in epochs)  # one cut for an epoch
    assert len({tuple(starts.argsort()) for starts in epochs}) == 4 * 3 * 2  # all orders
