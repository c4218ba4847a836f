"""An independent replica of train.py's model and training in PyTorch, to search settings with.

    python tests/lab/replica.py TEXTFILE [name=value ...]     for example n_emb=192 dropout=0.1

On a machine of two CPU cores and no GPU it trains several times faster than train.py can. Names
and defaults are those of train.py's default model, and it computes the same thing with other random
numbers. A figure that comes from here is marked as such in tests/lab/MEASUREMENTS.md. It needs
PyTorch and a C++ compiler, and saves nothing. With glibc, these environment variables make it
faster by about a fifth, as memory is then kept from step to step and in large pages:

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_TOP_PAD_=100000000
    MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

settings = dict(ctx_len=128, n_emb=128, n_heads=4, n_layers=3, dropout=0.0, num_epochs=20,
                batch_size=32, lr=3e-3, warmup_steps=100, weight_decay=0.5, beta1=0.9, beta2=0.99,
                max_norm=1.0, seed=0, threads=2)


class Dropout:
    """Dropout whose random numbers, 16 bits for each value, are drawn ahead of the step.

    Torch's own generator for the CPU takes longer than the matrix products of a small model.
    """

    def __init__(self, p, bits):
        self.limit, self.scale = round(p * 65536) - 32768, 1 / (1 - p)
        self.bits, self.used = bits, 0

    def __call__(self, x):
        if self.bits is None:
            return x
        bits = self.bits[self.used : self.used + x.numel()].view(x.shape)
        self.used += x.numel()
        return torch.where(bits >= self.limit, x * self.scale, 0.0)


class Block(nn.Module):
    def __init__(self, n_emb, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(n_emb), nn.LayerNorm(n_emb)
        self.qkv = nn.Linear(n_emb, 3 * n_emb)
        self.attn_c_proj = nn.Linear(n_emb, n_emb)
        self.c_fc, self.mlp_c_proj = nn.Linear(n_emb, 4 * n_emb), nn.Linear(4 * n_emb, n_emb)

    def forward(self, x, drop):
        B, T, C = x.shape
        qkv = self.qkv(self.ln_1(x)).view(B, T, 3, self.n_heads, C // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_heads, T, head_size)
        out = []
        for i in range(0, T, 128):  # queries by the 128, so as not to compute all that is masked
            S = min(i + 128, T)
            scores = q[:, :, i:S] @ k[:, :, :S].transpose(-1, -2) / math.sqrt(C // self.n_heads)
            scores = torch.where(torch.arange(i, S)[:, None] < torch.arange(S), -math.inf, scores)
            out.append(drop(scores.softmax(-1)) @ v[:, :, :S])
        out = torch.cat(out, 2)
        x = x + drop(self.attn_c_proj(out.transpose(1, 2).reshape(B, T, C)))
        hidden = F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        return x + drop(self.mlp_c_proj(hidden))


class GPT(nn.Module):
    def __init__(self, vocab_size, s):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, s.n_emb), nn.Embedding(s.ctx_len, s.n_emb)
        self.blocks = nn.ModuleList(Block(s.n_emb, s.n_heads) for _ in range(s.n_layers))
        self.ln_f = nn.LayerNorm(s.n_emb)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                scale = math.sqrt(2 * s.n_layers) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(weight, std=0.02 / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, x, y, p=0.0, bits=None):
        """The mean loss on (B, T) tokens x with labels y; with random bits, in training mode."""
        drop = Dropout(p, bits)
        x = drop(self.wte(x) + self.wpe.weight[: x.shape[1]])
        for block in self.blocks:
            x = block(x, drop)
        logits = self.ln_f(x) @ self.wte.weight.T
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def evaluate(model, val, s):
    """The mean loss over val in whole chunks of ctx_len, in order; the few last tokens are left."""
    whole = (len(val) - 1) // s.ctx_len * s.ctx_len
    x, y = val[:whole].view(-1, s.ctx_len), val[1 : whole + 1].view(-1, s.ctx_len)
    with torch.no_grad():
        batches = zip(x.split(s.batch_size), y.split(s.batch_size), strict=True)
        return sum(model(a, b).item() * b.numel() for a, b in batches) / whole


def main():
    for name, value in (argument.split("=") for argument in sys.argv[2:]):
        settings[name] = type(settings[name])(value)  # KeyError if there is no such setting
    s = type("Settings", (), settings)
    torch.set_num_threads(s.threads)
    torch.manual_seed(s.seed)
    rng = np.random.Generator(np.random.SFC64(s.seed))

    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    vocab = sorted(set(text))
    token_of = {character: token for token, character in enumerate(vocab)}
    tokens = torch.tensor([token_of[character] for character in text])
    boundary = len(tokens) * 9 // 10
    train, val = tokens[:boundary], tokens[boundary:]

    model = GPT(len(vocab), s)
    weights = dict(model.named_parameters())
    print(f"{settings}\n{sum(w.numel() for w in weights.values()):,} parameters", flush=True)
    decayed = [w for n, w in weights.items() if n.startswith("blocks") and w.ndim == 2]
    others = [w for n, w in weights.items() if not (n.startswith("blocks") and w.ndim == 2)]
    groups = [{"params": decayed, "weight_decay": s.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=(s.beta1, s.beta2), fused=True)
    loss_fn = torch.compile(model, dynamic=False)
    n_bits = s.n_emb + s.n_layers * (2 * s.n_emb + s.n_heads * s.ctx_len)  # at most, for a token
    n_draws = -(-s.batch_size * s.ctx_len * n_bits // 4)  # of 64 bits, which serve four values

    n_chunks = len(train) // s.ctx_len - 1
    steps_per_epoch = n_chunks // s.batch_size
    step, started = 0, time.perf_counter()
    for epoch in range(s.num_epochs):
        starts = rng.permutation(n_chunks)[: steps_per_epoch * s.batch_size] * s.ctx_len
        starts = torch.from_numpy(starts + rng.integers(s.ctx_len)).view(-1, s.batch_size, 1)
        losses = []
        for rows in starts + torch.arange(s.ctx_len):  # (batch_size, ctx_len), places in the text
            bits = None
            if s.dropout > 0:
                bits = rng.integers(2**64, size=n_draws, dtype=np.uint64)
                bits = torch.from_numpy(bits.view(np.int16))
            loss = loss_fn(train[rows], train[rows + 1], s.dropout, bits)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), s.max_norm, foreach=True)
            warm = min(1, (step + 1) / max(1, s.warmup_steps))
            for group in optimizer.param_groups:
                group["lr"] = s.lr * warm * (1 - step / (steps_per_epoch * s.num_epochs))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
        print(f"epoch {epoch}: train {np.mean(losses):.4f}, val {evaluate(model, val, s):.4f}, "
              f"{time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
