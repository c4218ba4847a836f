"""GPT-2, its loss, AdamW and Kneser-Ney written a second time: in NumPy, in float64, from papers.

The weights are a flat dict of arrays with the names of train.GPT's parameters.
"""

import math

import numpy as np


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def shapes(vocab_size, ctx_len, n_emb, n_layers):
    """The name and the shape of every parameter."""
    C = n_emb
    block = {"attn.q_proj": (C, C), "attn.k_proj": (C, C), "attn.v_proj": (C, C), "attn.c_proj": (C, C),
             "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C), "ln_1": (C,), "ln_2": (C,)}
    layers = {f"blocks.{i}.{name}": block[name] for i in range(n_layers) for name in block}
    layers["ln_f"] = (C,)
    return {"wte.weight": (vocab_size, C), "wpe.weight": (ctx_len, C),
            **{f"{name}.weight": shape for name, shape in layers.items()},
            **{f"{name}.bias": shape[:1] for name, shape in layers.items()}}


def count_parameters(vocab_size, ctx_len, n_emb, n_layers):
    C = n_emb
    block = 2 * 2 * C + 4 * (C * C + C) + (4 * C * C + 4 * C) + (4 * C * C + C)
    return vocab_size * C + ctx_len * C + n_layers * block + 2 * C


def random_weights(vocab_size, ctx_len, n_emb, n_layers):
    """Weights of which none is 0 or 1, and large enough for every part to matter."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in shapes(vocab_size, ctx_len, n_emb, n_layers).items():
        is_gain = "ln_" in name and name.endswith("weight")
        weights[name] = (is_gain + 0.3 * rng.normal(size=shape)).astype(np.float32)
    return weights


def forward(weights, tokens, n_heads):
    """The logits (B, T, vocab_size) for tokens (B, T)."""
    w = {name: np.asarray(weight, dtype=np.float64) for name, weight in weights.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def gelu(x):
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    T = tokens.shape[1]
    future = np.triu(np.full((T, T), -np.inf), k=1)
    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    size = x.shape[2] // n_heads
    for i in range(sum(name.endswith("q_proj.weight") for name in w)):
        block = f"blocks.{i}."
        a = norm(x, block + "ln_1")
        q, k, v = (linear(a, f"{block}attn.{part}_proj") for part in "qkv")
        heads = []
        for start in range(0, x.shape[2], size):
            head = np.s_[:, :, start : start + size]
            scores = np.einsum("bti,bsi->bts", q[head], k[head]) / math.sqrt(size)
            heads.append(softmax(scores + future) @ v[head])
        x = x + linear(np.concatenate(heads, axis=2), block + "attn.c_proj")
        a = gelu(linear(norm(x, block + "ln_2"), block + "mlp.c_fc"))
        x = x + linear(a, block + "mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def loss(weights, x, y, n_heads):
    """The mean cross-entropy of batches x and y (B, T)."""
    p = softmax(forward(weights, x, n_heads))
    return -np.log(np.take_along_axis(p, y[..., None], axis=2)).mean()


def clip(gradients, max_norm):
    """Gradients (a dict), scaled down to max_norm if all together are longer."""
    norm = math.sqrt(sum((g * g).sum() for g in gradients.values()))
    return {name: g * min(1, max_norm / norm) for name, g in gradients.items()}


class AdamW:
    """AdamW with bias correction and decoupled decay, for one array."""

    def __init__(self, beta1, beta2, weight_decay):
        self.beta1, self.beta2, self.weight_decay = beta1, beta2, weight_decay
        self.m = self.v = self.t = 0

    def step(self, w, gradient, lr):
        """What w becomes."""
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * gradient
        self.v = self.beta2 * self.v + (1 - self.beta2) * gradient**2
        m = self.m / (1 - self.beta1**self.t)
        v = self.v / (1 - self.beta2**self.t)
        return w - lr * (m / (np.sqrt(v) + 1e-8) + self.weight_decay * w)


def kneser_ney(train_tokens, val_tokens, vocab_size, order):
    """The mean losses of interpolated modified Kneser-Ney with n-grams up to n, for each n.

    Every token of val_tokens but the first is scored. The highest n goes by its counts, each lower
    one by how many different tokens were seen before it. A discount is taken from counts of 1, of
    2, and of 3 or more (the counts of counts give it), and goes to the next lower n.
    """
    def grams(tokens, n):  # each run of n tokens, as one number
        return sum(tokens[i : len(tokens) - n + 1 + i].astype(np.int64) * vocab_size ** (n - 1 - i)
                   for i in range(n))

    def look_up(keys, values, wanted):
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, values[at], 0)

    def mixed(n, keys, counts, p):
        """p after n-grams with these counts. The first tokens have less before them, and keep p."""
        n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
        discounts = np.zeros(4)
        if n1 and n2 and n3 and n4:
            y = n1 / (n1 + 2 * n2)
            discounts[1:] = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
        taken = discounts[np.minimum(counts, 3)]
        contexts, place = np.unique(keys // vocab_size, return_inverse=True)
        totals = np.bincount(place, counts)
        shares = np.bincount(place, taken) / totals
        here = grams(val_tokens, n) if n > 1 else val_tokens[1:]
        total = look_up(contexts, totals, here // vocab_size)
        lower = p[-len(here) :]
        higher = (look_up(keys, counts - taken, here) / np.maximum(total, 1)
                  + look_up(contexts, shares, here // vocab_size) * lower)
        return np.concatenate([p[: -len(here)], np.where(total > 0, higher, lower)])

    losses, p = [], np.full(len(val_tokens) - 1, 1 / vocab_size)
    seen = np.unique(grams(train_tokens, 1), return_counts=True)
    for n in range(1, order + 1):
        losses.append(-np.log(mixed(n, *seen, p)).mean())
        seen = np.unique(grams(train_tokens, n + 1), return_counts=True)
        p = mixed(n, *np.unique(seen[0] % vocab_size**n, return_counts=True), p)
    return losses
