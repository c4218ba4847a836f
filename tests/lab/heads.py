"""Where the heads of a trained model look: python tests/lab/heads.py [folder of a run]

Prints, for each head, the mean share of its attention weights that the last characters get: the
position itself, the one before, and so on. Positions with fewer than 12 before them do not count.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import train  # noqa: E402

FIRST = 12


def main(folder):
    model, tokenizer = train.load_model(folder / "model.safetensors")
    text = train.load_text(folder / "input.txt")
    _, tokens = train.split(np.array(tokenizer.encode(text)))
    recorded = []  # of each block, (B, n_heads, T, T)
    attention_weights = train.attention_weights

    def recording(q, k):
        weights = attention_weights(q, k)
        recorded.append(np.array(weights))
        return weights

    train.attention_weights = recording
    sums, count = 0, 0
    for x, _ in train.get_batches(tokens, model.config.ctx_len, 64):
        recorded.clear()
        model(x)
        weights = np.stack(recorded)  # (n_layers, B, n_heads, T, T)
        for i in range(FIRST, x.shape[1]):
            last = weights[:, :, :, i, i + 1 - FIRST : i + 1]  # (n_layers, B, n_heads, 12)
            sums += last[..., ::-1].sum(axis=1)
            count += len(x)
    for block, head in np.ndindex(sums.shape[:2]):
        shares = sums[block, head] / count
        print(f"block {block}, head {head}: {shares.round(2)}, 1 to 4: {shares[1:5].sum():.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
