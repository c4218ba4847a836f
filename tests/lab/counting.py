"""The losses of n-gram models: python tests/lab/counting.py input.txt"""

import sys
from pathlib import Path

import numpy as np


def kneser_ney(train_tokens, val_tokens, vocab_size, order):
    """The mean losses of interpolated modified Kneser-Ney with n-grams up to n, for each n.

    The highest n goes by its counts, each lower one by how many different tokens were seen before
    it. A discount is taken from counts of 1, of 2, and of 3 or more, and goes to the next lower n.
    """
    def grams(tokens, n):  # each run of n tokens, as one number
        return sum(tokens[i : len(tokens) - n + 1 + i] * vocab_size ** (n - 1 - i)
                   for i in range(n))

    def look_up(keys, values, wanted):
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, values[at], 0)

    def mixed(keys, counts, wanted, p):
        """The probabilities of the wanted n-grams, given these counts, and p of the next lower."""
        n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
        discounts = np.zeros(4)
        if n1 and n2 and n3 and n4:
            y = n1 / (n1 + 2 * n2)
            discounts[1:] = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
        taken = discounts[np.minimum(counts, 3)]
        contexts, place = np.unique(keys // vocab_size, return_inverse=True)
        total = look_up(contexts, np.bincount(place, counts), wanted // vocab_size)
        left = look_up(contexts, np.bincount(place, taken), wanted // vocab_size)
        seen = look_up(keys, counts - taken, wanted)
        return np.where(total > 0, (seen + left * p) / np.maximum(total, 1), p)

    losses, p = [], np.full(len(val_tokens), 1 / vocab_size)
    for n in range(1, order + 1):
        wanted, longer = grams(val_tokens, n), np.unique(grams(train_tokens, n + 1))
        counted = np.unique(grams(train_tokens, n), return_counts=True)
        losses.append(-np.log(mixed(*counted, wanted, p)).mean())
        p = mixed(*np.unique(longer % vocab_size**n, return_counts=True), wanted, p)[1:]
    return losses


def losses_of(text, order=7):
    """The losses on the last tenth of a text, for each n, by the counts in all that is before."""
    vocab, tokens = np.unique(list(text), return_inverse=True)
    train_tokens, val_tokens = np.split(tokens, [len(tokens) * 9 // 10])
    return kneser_ney(train_tokens, val_tokens, len(vocab), order)


if __name__ == "__main__":
    for n, loss in enumerate(losses_of(Path(sys.argv[1]).read_text(encoding="utf-8")), 1):
        print(f"n = {n}: {loss:.3f}")
