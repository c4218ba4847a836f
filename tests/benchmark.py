"""Speed and memory, measured side by side in one run: python tests/benchmark.py [seconds]

The model is the default one at the top of train.py, on whatever device there is. All variants
take turns, for `seconds` (60) in training and a quarter of it in sampling; what is printed comes
from the median of each one's turns. Every turn in training is `STEPS` steps.
"""

import ast
import io
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

SOURCE = (ROOT / "train.py").read_text(encoding="utf-8")
DEFAULTS = {name: ast.literal_eval(value) for name, value in
            re.findall(r"^(\w+) = (?:\S+ if small else )?([^#\n]+?) +# ",
                       SOURCE.split("# The model.\n")[1].split("# 2. Data\n")[0], re.M)}
STEPS = 20 if mx.default_device() == mx.gpu else 2


def prepare():
    """Sets the default settings and epochs of STEPS steps; returns all tokens to train on."""
    for name, value in {**DEFAULTS, "num_epochs": 10**9}.items():
        setattr(train, name, value)
    train.evaluate = lambda *_: 0.0
    train.count_batches = lambda *_: STEPS
    text = train.load_text(ROOT / "input.txt")
    return train.split(np.array(train.CharTokenizer(text).encode(text), dtype=np.int32))[0]


def ours(tokens, compiled=True):
    """train.py as it is: a turn is an epoch of its loop, without the evaluation."""
    mx.random.seed(0)
    model, optimizer = train.GPT(65), train.make_optimizer(10**9)
    optimizer.init(model.trainable_parameters())
    epochs = train.train(model, optimizer, tokens, tokens, loss_fn=train.shared_loss)

    def turn():
        (mx.enable_compile if compiled else mx.disable_compile)()
        next(epochs)
    return turn


def article(tokens):
    """The plain loop: all chunks shuffled at once, no mx.compile, .item() in every step."""
    mx.random.seed(0)
    model, optimizer = train.GPT(65), optim.AdamW(1e-3)
    loss_and_grad = nn.value_and_grad(model, train.loss_fn)
    B, T = train.batch_size, train.ctx_len
    rows = (len(tokens) - 1) // T
    x = mx.array(tokens[: rows * T].reshape(-1, T))
    y = mx.array(tokens[1 : rows * T + 1].reshape(-1, T))
    epoch = []

    def turn():
        mx.disable_compile()
        if not epoch:  # it holds for all turns: an epoch has many more steps than are run here
            order = mx.array(np.random.permutation(rows))
            epoch.extend([x[order], y[order]])
        (shuffled_x, shuffled_y), total = epoch, 0.0
        for i in range(0, STEPS * B, B):
            loss, grads = loss_and_grad(model, shuffled_x[i : i + B], shuffled_y[i : i + B])
            optimizer.update(model, grads)
            total += loss.item()
            mx.eval(model.parameters(), optimizer.state)
    return turn


def pytorch(tokens):
    """A PyTorch model of the same shape, if there are both PyTorch and a GPU for it."""
    try:
        import torch
    except ImportError:
        return None
    device = ("cuda" if torch.cuda.is_available() else
              "mps" if torch.backends.mps.is_available() else None)
    if device is None:
        return None
    F, C, H, p = torch.nn.functional, train.n_emb, train.n_heads, train.dropout

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = torch.nn.LayerNorm(C), torch.nn.LayerNorm(C)
            self.qkv, self.proj = torch.nn.Linear(C, 3 * C, bias=False), torch.nn.Linear(C, C)
            self.mlp = torch.nn.Sequential(torch.nn.Linear(C, 4 * C), torch.nn.GELU(),
                                           torch.nn.Linear(4 * C, C), torch.nn.Dropout(p))

        def forward(self, x):
            B, T, _ = x.shape
            q, k, v = self.qkv(self.ln_1(x)).view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
            x = x + F.dropout(self.proj(out.transpose(1, 2).reshape(B, T, C)), p)
            return x + self.mlp(self.ln_2(x))

    wte, wpe = torch.nn.Embedding(65, C).to(device), torch.nn.Embedding(train.ctx_len, C).to(device)
    body = torch.nn.Sequential(*(Block() for _ in range(train.n_layers)), torch.nn.LayerNorm(C),
                               torch.nn.Linear(C, 65)).to(device)
    weights = [*wte.parameters(), *wpe.parameters(), *body.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=device == "cuda")
    places = torch.arange(train.ctx_len, device=device)

    def turn():
        for batch in train.get_batches(tokens, train.batch_size, shuffle=True):
            x, y = (torch.from_numpy(np.array(a)).long().to(device) for a in batch)
            logits = body(F.dropout(wte(x) + wpe(places), p))
            loss = F.cross_entropy(logits.view(-1, 65), y.view(-1))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        loss.item()
    return turn


def race(variants, seconds):
    """The median seconds of a turn of each variant, after one turn each to warm up."""
    times = {name: [] for name in variants}
    for turn in variants.values():
        turn()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[name]) < 3:
        for name, turn in variants.items():
            start = time.perf_counter()
            turn()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(turns) for name, turns in times.items()}


def sampling():
    """The turns of generate at a full window, and of the article's way, the window run anew."""
    mx.random.seed(0)
    model = train.GPT(65)
    model.eval()
    window = np.random.default_rng(0).integers(0, 65, train.ctx_len).tolist()
    made = model.generate(window, 10**9)

    def with_cache():  # as many characters as lie between two readings-in of half the window
        for _ in range(train.ctx_len // 2):
            next(made)

    def without_cache():
        window.append(mx.random.categorical(model(mx.array([window]))[0, -1]).item())
        del window[0]
    return {"with the key/value cache": with_cache, "the whole window each time": without_cache}


def peak_memory(variant):
    """MiB in a fresh process, at most, by MLX's own account."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
            "from benchmark import *\n"
            f"turn = {variant}; turn(); turn()\n"
            "print(mx.get_peak_memory() / 2**20)")
    return float(subprocess.check_output([sys.executable, "-c", code], text=True))


def seconds_to_first_step():
    """From the start of python to the call of the first training step, with our input.txt."""
    call = "            loss = step("
    assert SOURCE.count(call) == 1
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.py").write_text(
            SOURCE.replace(call, "            raise SystemExit('first step')\n" + call), "utf-8")
        Path(folder, "input.txt").write_bytes((ROOT / "input.txt").read_bytes())
        times = []
        for _ in range(5):
            start = time.perf_counter()
            result = subprocess.run([sys.executable, "train.py"], cwd=folder, capture_output=True)
            times.append(time.perf_counter() - start)
            assert b"first step" in result.stderr
    return statistics.median(times)


VIEWS = {"Transpose", "Reshape", "Squeeze", "Unflatten", "Flatten", "ExpandDims", "Broadcast", "Split"}


def operations():
    """How many operations a compiled step has, from MLX's own graph, without mere views of memory."""
    mx.enable_compile()
    mx.random.seed(0)
    model, optimizer = train.GPT(65), train.make_optimizer(10**9)
    optimizer.init(model.trainable_parameters())
    graphs, begin = [], mx.async_eval

    def note(loss, state):
        graph = io.StringIO()
        mx.export_to_dot(graph, loss, *(array for _, array in tree_flatten(state)))
        graphs.append(re.findall(r'label ="(\w+)[^"]*", shape=rectangle', graph.getvalue()))
        begin(loss, state)

    mx.async_eval = note
    next(train.train(model, optimizer, np.arange(10**5) % 65, np.arange(10**4) % 65))
    mx.async_eval = begin
    kinds = Counter(re.sub("Compiled.*", "Compiled", name) for name in graphs[-1])
    return Counter({name: n for name, n in kinds.items() if name not in VIEWS})


def show(title, rows, digits, better, baseline):
    print(f"\n{title}")
    for name, value in rows.items():
        ratio = value / rows[baseline] if better == "more" else rows[baseline] / value
        print(f"  {name:<32}{value:>12,.{digits}f}   {ratio:6.2f} times as good")


def main():
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    tokens = prepare()
    print(f"MLX {mx.__version__}, {mx.default_device()}: the default model, batches of "
          f"{train.batch_size} x {train.ctx_len} characters")
    plain = "the article's loop"
    variants = {"train.py": ours(tokens), "train.py, not compiled": ours(tokens, compiled=False),
                plain: article(tokens), "PyTorch": pytorch(tokens)}
    times = race({name: turn for name, turn in variants.items() if turn}, seconds)
    characters = STEPS * train.batch_size * train.ctx_len
    show("Training, characters a second", {name: characters / t for name, t in times.items()}, 0,
         "more", plain)
    show("Peak memory in training, MiB",
         {"train.py": peak_memory("ours(prepare())"),
          "train.py, not compiled": peak_memory("ours(prepare(), compiled=False)"),
          plain: peak_memory("article(prepare())")}, 0, "less", plain)
    turns = sampling()
    times = race(turns, seconds / 4)
    cached, whole = turns
    show("Sampling, characters a second",
         {cached: train.ctx_len // 2 / times[cached], whole: 1 / times[whole]}, 0, "more", whole)
    kinds = operations()
    print(f"\nOperations in a compiled step: {sum(kinds.values())}, of which " +
          ", ".join(f"{n} {name}" for name, n in kinds.most_common(8)))
    print(f"\nFrom start to first training step: {seconds_to_first_step():.2f} s")


if __name__ == "__main__":
    main()
