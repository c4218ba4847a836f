"""GPT-2, its loss, and AdamW written a second time: in NumPy, in float64, from papers.

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
    block = {**{f"attn.{part}_proj": (C, C) for part in "qkvc"},
             "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C), "ln_1": (C,), "ln_2": (C,)}
    layers = {f"blocks.{i}.{name}": block[name] for i in range(n_layers) for name in block}
    layers["ln_f"] = (C,)
    return {"wte.weight": (vocab_size, C), "wpe.weight": (ctx_len, C),
            **{f"{name}.weight": shape for name, shape in layers.items()},
            **{f"{name}.bias": shape[:1] for name, shape in layers.items()}}


def count_parameters(*sizes):
    return sum(math.prod(shape) for shape in shapes(*sizes).values())


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


def cross_entropy(logits, y):
    """The mean of -ln p of the targets y (B, T), by logits (B, T, vocab_size)."""
    p = softmax(np.asarray(logits, dtype=np.float64))
    return -np.log(np.take_along_axis(p, y[..., None], axis=2)).mean()


def loss(weights, x, y, n_heads):
    """The loss of GPT-2 with these weights, for batches x and y (B, T)."""
    return cross_entropy(forward(weights, x, n_heads), y)


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
