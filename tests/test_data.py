"""Sections 2 to 4: the text, the tokenizer and the batches."""

import numpy as np
import pytest
import train


def test_round_trip():
    text = "Hello, World!\n  ROMEO: 'tis & so?"
    tokenizer = train.CharTokenizer(text)
    assert tokenizer.vocab == sorted(set(text)) and tokenizer.vocab_size == len(set(text))
    ids = tokenizer.encode(text)
    assert isinstance(ids, list) and all(type(i) is int for i in ids)
    assert ids == [sorted(set(text)).index(c) for c in text]  # one by one, without the table
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_round_trip_of_emoji_and_chinese():
    text = "床前明月光 🌙🌕 naïve\n"
    tokenizer = train.CharTokenizer(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(set(text))


@pytest.mark.parametrize("unknown", ["z", "\x00", "é", "🌙", "\udcff"])
def test_unknown_character_is_named(unknown):
    tokenizer = train.CharTokenizer("abcde")
    with pytest.raises(KeyError) as error:
        tokenizer.encode("ab" + unknown + "cQ")
    assert error.value.args == (unknown,)


def test_the_shipped_text(shipped_text):
    tokenizer = train.CharTokenizer(shipped_text)
    assert len(shipped_text) == 1_198_193 and tokenizer.vocab_size == 65
    assert tokenizer.encode(shipped_text) == [tokenizer.vocab.index(c) for c in shipped_text]


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\r"])
def test_line_ends_and_byte_order_mark(tmp_path, ends):
    file = tmp_path / "text"
    file.write_bytes(b"\xef\xbb\xbf" + ends.join([b"one", b"two", b"three"]))
    assert train.load_text(file) == "one\ntwo\nthree"


@pytest.mark.parametrize("n", [10, 99, 100, 101, 1_198_193])
def test_split_is_nine_to_one(n):
    first, last = train.split(range(n))
    assert list(first) + list(last) == list(range(n)) and len(first) == int(0.9 * n)


LENGTHS = [60, 61, 119, 120, 121, 500, 1001]


def batches_of(tokens, batch_size, shuffle):
    return [(np.array(x), np.array(y)) for x, y in train.get_batches(tokens, batch_size, shuffle)]


@pytest.mark.parametrize("n", LENGTHS)
def test_training_batches(tiny, n):
    T, B = train.ctx_len, train.batch_size
    np.random.seed(n)
    for epoch in range(20):  # many offsets
        batches = batches_of(np.arange(n), B, True)
        assert len(batches) == train.count_batches(range(n), B) == (n // T - 1) // B
        for x, y in batches:
            assert x.shape == y.shape == (B, T)
            assert np.issubdtype(x.dtype, np.integer)
            assert (np.diff(x, axis=1) == 1).all()  # pieces of the text, uncut
            assert (y == x + 1).all()  # each label is the token after
        labels = np.concatenate([y.ravel() for _, y in batches]) if batches else np.array([])
        assert len(set(labels)) == len(labels)  # no label twice
        assert n - len(labels) < (B + 1) * T  # less than a batch and a row are missing


def test_training_batches_differ_between_epochs(tiny):
    np.random.seed(0)
    epochs = [np.concatenate([x[:, 0] for x, _ in batches_of(np.arange(2000), 4, True)])
              for _ in range(30)]
    offsets = {int(starts.min() % train.ctx_len) for starts in epochs}
    assert all((starts % train.ctx_len == starts[0] % train.ctx_len).all() for starts in epochs)
    assert len(offsets) > 6  # of 12 possible ones
    assert not any((np.diff(starts) > 0).all() for starts in epochs)  # never in the text's order


@pytest.mark.parametrize("n", LENGTHS + [2, 3, 12, 13, 24, 25])
def test_evaluation_batches(tiny, n):
    before = np.random.get_state()[1].copy()
    batches = batches_of(np.arange(n), 4, False)
    used = (n - 1) // 12 * 12  # every token but the first is a label once, as far as rows go
    assert [t for x, _ in batches for t in x.ravel()] == list(range(used))
    assert [t for _, y in batches for t in y.ravel()] == list(range(1, used + 1))
    assert all(x.shape == y.shape and x.shape[1] == 12 for x, y in batches)
    assert all(len(x) == 4 for x, _ in batches[:-1]) and all(1 <= len(x) <= 4 for x, _ in batches)
    assert (np.random.get_state()[1] == before).all()  # nothing random about it
