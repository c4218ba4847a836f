"""Speed and memory, measured side by side in one run: python tests/benchmark.py [seconds]

The model is the default one of train.py, on whatever device there is, and on a CPU the small one,
too. All variants take turns, for `seconds` (60) in training and a quarter of it in sampling. What
is printed comes from the median of each one's turns. A turn in training is `STEPS` steps.
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
STEPS = 20 if mx.default_device() == mx.gpu else 2


def settings_of(small):
    """The constants in the block `if not small:` of train.py, or those in its `else:`."""
    for node in ast.parse(SOURCE).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "not small":
            lines = node.orelse if small else node.body
            return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def prepare(small=False):
    """Sets a model's settings. Returns the tokens of the training set."""
    for name, value in settings_of(small).items():
        setattr(train, name, value)
    text = train.load_text(ROOT / "input.txt")
    return train.split(np.array(train.CharTokenizer(text).encode(text), dtype=np.int32))[0]


def new_model():
    mx.random.seed(0)
    return train.GPT(train.GPTConfig(65, train.ctx_len, train.n_emb, train.n_heads,
                                     train.n_layers, train.dropout))


def endless_batches(tokens):
    rng = np.random.default_rng(0)
    while True:
        yield from train.get_batches(tokens, train.ctx_len, train.batch_size, rng)


def ours(tokens, compiled=True, loss_fn=None, steps=STEPS):
    """train.py's step, batches, and loop, with the loss function that it chooses, or another."""
    model = new_model()
    optimizer = train.make_optimizer(10**9)
    optimizer.init(model.trainable_parameters())
    step = train.make_step(model, optimizer, loss_fn or train.choose_loss_fn())
    batches = endless_batches(tokens)

    def turn():
        (mx.enable_compile if compiled else mx.disable_compile)()
        model.train()
        for _ in range(steps):
            loss = step(*next(batches))
            mx.async_eval(loss, model.state, optimizer.state)
        mx.eval(loss, model.state, optimizer.state)
    return turn


def article(tokens):
    """The plain loop: all chunks shuffled at once, no mx.compile, .item() in every step."""
    model, optimizer = new_model(), optim.AdamW(1e-3)
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
            self.qkv, self.proj = torch.nn.Linear(C, 3 * C), torch.nn.Linear(C, C)
            self.mlp = torch.nn.Sequential(torch.nn.Linear(C, 4 * C), torch.nn.GELU("tanh"),
                                           torch.nn.Linear(4 * C, C), torch.nn.Dropout(p))

        def forward(self, x):
            B, T, _ = x.shape
            q, k, v = self.qkv(self.ln_1(x)).view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
            x = x + F.dropout(self.proj(out.transpose(1, 2).reshape(B, T, C)), p)
            return x + self.mlp(self.ln_2(x))

    wte, wpe = torch.nn.Embedding(65, C).to(device), torch.nn.Embedding(train.ctx_len, C).to(device)
    blocks = [Block() for _ in range(train.n_layers)]
    body = torch.nn.Sequential(*blocks, torch.nn.LayerNorm(C)).to(device)
    weights = [*wte.parameters(), *wpe.parameters(), *body.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=device == "cuda")
    positions = torch.arange(train.ctx_len, device=device)

    @torch.compile
    def loss_of(x, y):
        logits = body(F.dropout(wte(x) + wpe(positions), p)) @ wte.weight.T
        return F.cross_entropy(logits.view(-1, 65), y.view(-1))

    batches = endless_batches(tokens)

    def turn():
        for _ in range(STEPS):
            x, y = (torch.from_numpy(np.array(a)).long().to(device) for a in next(batches))
            loss = loss_of(x, y)
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
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, turn in variants.items():
            start = time.perf_counter()
            turn()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(turns) for name, turns in times.items()}


def sampling():
    """The turns of generate at a full window, and of the article's way, the window run anew."""
    model = new_model()
    model.eval()
    window = np.random.default_rng(0).integers(0, 65, train.ctx_len).tolist()
    made = train.generate(model, window, 10**9)

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
    call = "\n            loss = step("
    assert SOURCE.count(call) == 1
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.py").write_text(
            SOURCE.replace(call, "\n            raise SystemExit('first step')" + call), "utf-8")
        Path(folder, "input.txt").write_bytes((ROOT / "input.txt").read_bytes())
        times = []
        for _ in range(5):
            start = time.perf_counter()
            result = subprocess.run([sys.executable, "train.py"], cwd=folder, capture_output=True)
            times.append(time.perf_counter() - start)
            assert b"first step" in result.stderr
    return statistics.median(times)


VIEWS = {"Transpose", "Reshape", "Squeeze", "Unflatten", "Flatten", "ExpandDims", "Broadcast",
         "Split"}


def operations(tokens):
    """How many operations a compiled step has, in MLX's own graph, without mere views of memory."""
    mx.enable_compile()
    model, optimizer = new_model(), train.make_optimizer(10**9)
    optimizer.init(model.trainable_parameters())
    step = train.make_step(model, optimizer, train.loss_fn)
    batches = endless_batches(tokens)
    mx.eval(step(*next(batches)), model.state, optimizer.state)
    loss = step(*next(batches))
    graph = io.StringIO()
    arrays = [array for _, array in tree_flatten([model.state, optimizer.state])]
    mx.export_to_dot(graph, loss, *arrays)
    names = re.findall(r'label ="(\w+)[^"]*", shape=rectangle', graph.getvalue())
    kinds = Counter(re.sub("Compiled.*", "Compiled", name) for name in names)
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
    if mx.default_device() == mx.cpu:
        tokens = prepare(small=True)
        cores = {"two cores": ours(tokens, steps=50),
                 "one core": ours(tokens, loss_fn=train.loss_fn, steps=50)}
        characters = 50 * train.batch_size * train.ctx_len
        times = race(cores, seconds / 2)
        show("Training the small model, characters a second",
             {name: characters / t for name, t in times.items()}, 0, "more", "one core")
        tokens = prepare()
    kinds = operations(tokens)
    print(f"\nOperations in a compiled step: {sum(kinds.values())}, of which " +
          ", ".join(f"{n} {name}" for name, n in kinds.most_common(8)))
    print(f"\nFrom start to first training step: {seconds_to_first_step():.2f} s")


if __name__ == "__main__":
    main()
