"""Speed and memory, measured side by side in one run: python tests/lab/benchmark.py [seconds]

The model is the default one of train.py, on whatever device there is; on a CPU, the small one, too.
Variants take turns, for `seconds` (60) in training, and what is printed comes from the median of
each one's turns. With --ladder, measures only the steps of the README's ladder, with both models.
"""

import argparse
import io
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

LAB = Path(__file__).resolve().parent
ROOT = LAB.parent.parent
sys.path.insert(0, str(LAB))

import experiments  # noqa: E402

SOURCE = (ROOT / "train.py").read_text(encoding="utf-8")
STEPS = 20 if mx.default_device() == mx.gpu else 2


def module(source=SOURCE, small=False, two_cores=True):
    """A script like train.py as a module, with the settings of one of its models."""
    source = experiments.forced(source, small)
    if not two_cores:
        source, n = re.subn(r"^    loss_fn = on_two_cores\(.*$", "    pass", source, flags=re.M)
        if n != 1:
            raise ValueError("train.py does not use on_two_cores once")
    train = types.ModuleType("train")
    sys.modules["train"] = train  # dataclass looks there
    exec(compile(source, "train.py", "exec"), vars(train))
    return train


def tokens_of(train):
    """The tokens of the training set."""
    text = train.load_text(ROOT / "input.txt")
    tokenizer = train.CharTokenizer(train.build_vocab(text))
    return train.split(np.array(tokenizer.encode(text), dtype=np.int32))[0]


def new_model(train):
    mx.random.seed(0)
    sizes = {name: getattr(train, name) for name in train.GPTConfig.__dataclass_fields__
             if hasattr(train, name)}
    return train.GPT(train.GPTConfig(vocab_size=65, **sizes))


def endless_batches(train):
    rng = np.random.default_rng(0)
    tokens = tokens_of(train)
    while True:
        yield from train.get_batches(tokens, train.ctx_len, train.batch_size, rng)


def ours(train, compiled=True, steps=STEPS):
    """A turn of train.py's step, batches, and loop."""
    model = new_model(train)
    optimizer = train.make_optimizer(10**9)
    optimizer.init(model.trainable_parameters())
    step = train.make_step(model, optimizer)
    batches = endless_batches(train)

    def turn():
        (mx.enable_compile if compiled else mx.disable_compile)()
        model.train()
        for _ in range(steps):
            loss = step(*next(batches))
            mx.async_eval(loss, model.state, optimizer.state)
        mx.eval(loss, model.state, optimizer.state)
    return turn


def article(train):
    """The plain loop: all chunks shuffled at once, no mx.compile, .item() in every step."""
    model, optimizer = new_model(train), optim.AdamW(1e-3)
    loss_and_grad = nn.value_and_grad(model, train.loss_fn)
    B, T, tokens = train.batch_size, train.ctx_len, tokens_of(train)
    rows = (len(tokens) - 1) // T
    order = mx.array(np.random.permutation(rows))
    x = mx.array(tokens[: rows * T].reshape(-1, T))[order]
    y = mx.array(tokens[1 : rows * T + 1].reshape(-1, T))[order]

    def turn():
        mx.disable_compile()
        total = 0.0
        for i in range(0, STEPS * B, B):
            loss, grads = loss_and_grad(model, x[i : i + B], y[i : i + B])
            optimizer.update(model, grads)
            total += loss.item()
            mx.eval(model.parameters(), optimizer.state)
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


def sampling(train):
    """The turns of generate at a full window, and of the article's way, the window run anew."""
    model = new_model(train)
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
    code = (f"import sys; sys.path.insert(0, {str(LAB)!r})\n"
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
        for _ in range(3):
            start = time.perf_counter()
            result = subprocess.run([sys.executable, "train.py"], cwd=folder, capture_output=True)
            times.append(time.perf_counter() - start)
            assert b"first step" in result.stderr
    return statistics.median(times)


VIEWS = {"Transpose", "Reshape", "Squeeze", "Unflatten", "Flatten", "ExpandDims", "Broadcast",
         "Split"}


def operations(train):
    """How many operations a compiled step has, in MLX's own graph, without mere views of memory.

    With one stream, since two halves would be counted twice, and with some dropout.
    """
    train.dropout = 0.03
    mx.enable_compile()
    model, optimizer = new_model(train), train.make_optimizer(10**9)
    optimizer.init(model.trainable_parameters())
    step = train.make_step(model, optimizer)
    batches = endless_batches(train)
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
        print(f"  {name:<32}{value:>12,.{digits}f}   {ratio:6.2f} times as good", flush=True)


def training(variants, seconds, tokens, baseline):
    """Races turns of training, of so many tokens each, and prints their speeds."""
    times = race(variants, seconds)
    show("Training, tokens a second", {name: tokens / t for name, t in times.items()}, 0, "more",
         baseline)


def cache_bytes(train, model):
    """The size of the caches of a model, when they are full."""
    caches = [train.KVCache() for _ in model.blocks]
    model(mx.zeros((1, train.ctx_len), dtype=mx.int32), caches)
    return sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)


def ladder(seconds):
    """Prints the speed, the parameters and the cache of each step of the ladder."""
    for small in (True, False):
        trains = [module(source, small) for source in experiments.ladder(SOURCE)]
        turns = {f"step {i}": ours(train) for i, train in enumerate(trains)}
        print(f"\nThe {'small' if small else 'default'} model")
        training(turns, seconds, STEPS * trains[0].batch_size * trains[0].ctx_len, "step 0")
        for i, train in enumerate(trains):
            model = new_model(train)
            print(f"  step {i}: {train.count_parameters(model):,} parameters, "
                  f"a full cache has {cache_bytes(train, model):,} bytes")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("seconds", nargs="?", type=float, default=60)
    parser.add_argument("--ladder", action="store_true")
    arguments = parser.parse_args()
    if arguments.ladder:
        return ladder(arguments.seconds)
    train = module()
    print(f"MLX {mx.__version__}, {mx.default_device()}: the default model, batches of "
          f"{train.batch_size} x {train.ctx_len} tokens")
    plain = "the article's loop"
    training({"train.py": ours(train), "train.py, not compiled": ours(train, compiled=False),
              plain: article(module(two_cores=False))}, arguments.seconds,
             STEPS * train.batch_size * train.ctx_len, plain)
    show("Peak memory in training, MiB",
         {"train.py": peak_memory("ours(module())"),
          "train.py, not compiled": peak_memory("ours(module(), compiled=False)"),
          "the gradient in four parts": peak_memory("ours(module(experiments.larger(SOURCE)[2]))"),
          plain: peak_memory("article(module(two_cores=False))")}, 0, "less", plain)
    turns = sampling(train)
    times = race(turns, arguments.seconds / 4)
    cached, whole = turns
    show("Sampling, tokens a second",
         {cached: train.ctx_len // 2 / times[cached], whole: 1 / times[whole]}, 0, "more", whole)
    if mx.default_device() == mx.cpu:
        print("\nThe small model")
        small = module(small=True)
        training({"two cores": ours(small, steps=50),
                  "one core": ours(module(small=True, two_cores=False), steps=50)},
                 arguments.seconds / 2, 50 * small.batch_size * small.ctx_len, "one core")
    kinds = operations(module(two_cores=False))
    print(f"\nOperations in a compiled step: {sum(kinds.values())}, of which " +
          ", ".join(f"{n} {name}" for name, n in kinds.most_common(8)))
    print(f"\nFrom start to first training step: {seconds_to_first_step():.2f} s")


if __name__ == "__main__":
    main()
