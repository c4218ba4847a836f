"""Sections 2 to 4: the text, the tokenizer, and the batches."""

import numpy as np
import pytest
import train


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\r"])
def test_load_text_knows_line_ends_and_byte_order_mark(tmp_path, ends):
    file = tmp_path / "text"
    file.write_bytes(b"\xef\xbb\xbf" + ends.join([b"one", "zwölf 🌙".encode(), b"three"]))
    assert train.load_text(file) == "one\nzwölf 🌙\nthree"


@pytest.mark.parametrize("n", [9, 10, 99, 100, 101, 1_198_193])
def test_split_is_nine_to_one(n):
    first, last = train.split(range(n))
    assert list(first) + list(last) == list(range(n)) and len(first) == int(0.9 * n)


@pytest.mark.parametrize("text", ["Hello, World!\n  'tis & so?", "床前明月光 🌙🌕 naïve\r\n", ""])
def test_tokenizer_round_trip(text):
    tokenizer = train.CharTokenizer(train.build_vocab(text))
    tokens = tokenizer.encode(text)
    assert all(type(token) is int for token in tokens)
    assert tokens == [sorted(set(text)).index(char) for char in text]
    assert tokenizer.decode(tokens) == text


def test_tokenizer_names_an_unknown_character():
    with pytest.raises(KeyError) as error:
        train.CharTokenizer(train.build_vocab("abcde")).encode("abzcQ")
    assert error.value.args == ("z",)


T, B = 12, 4
LENGTHS = [2, 12, 13, 24, 25, 60, 61, 119, 120, 121, 500]


def batches_of(tokens, rng=None):
    """The batches as NumPy arrays."""
    return [(np.array(x), np.array(y)) for x, y in train.get_batches(tokens, T, B, rng)]


@pytest.mark.parametrize("n", LENGTHS)
def test_batches_in_order(n):
    batches = batches_of(np.arange(n))
    used = (n - 1) // T * T  # every token but the first is a target once, as far as rows go
    assert [token for x, _ in batches for token in x.ravel()] == list(range(used))
    assert [token for _, y in batches for token in y.ravel()] == list(range(1, used + 1))
    rows = [len(x) for x, _ in batches]
    assert all(x.shape == y.shape == (len(x), T) for x, y in batches)
    assert all(count == B for count in rows[:-1]) and all(1 <= count <= B for count in rows)


@pytest.mark.parametrize("n", LENGTHS)
def test_random_batches(n):
    rng = np.random.default_rng(n)
    for _ in range(20):  # many random places to begin at
        batches = batches_of(np.arange(n), rng)
        assert len(batches) == max(0, train.count_batches(np.arange(n), T, B))
        targets = []
        for x, y in batches:
            assert x.shape == y.shape == (B, T)
            assert (np.diff(x) == 1).all() and (y == x + 1).all()  # pieces of the text
            targets += y.ravel().tolist()
        assert len(set(targets)) == len(targets)  # no token is a target twice
        assert n - len(targets) <= (B + 1) * T  # less than a batch and a row are left out


def test_random_batches_begin_everywhere_in_random_order():
    rng = np.random.default_rng(0)
    epochs = [np.concatenate([x[:, 0] for x, _ in batches_of(np.arange(74), rng)])
              for _ in range(300)]  # 4 of 5 rows each
    assert set(np.concatenate(epochs)) == set(range(5 * T))
    assert all(len(set(starts % T)) == 1 for starts in epochs)  # one cut for an epoch
    assert len({tuple(starts.argsort()) for starts in epochs}) == 4 * 3 * 2  # all orders
