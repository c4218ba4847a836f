"""README's "From here to GPT-2": its diff and its loader, against GPT-2 in NumPy and another's."""

import importlib.util
import math
import re
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import Folder
from test_documents import apply, blocks_of, section

V, C, H, L, T = 23, 16, 4, 3, 10
PART = section("From here to GPT-2")


def openai_weights(V=V, C=C, L=L, T=T, draw=np.random.default_rng(0).normal):
    """Arrays with the names and shapes of OpenAI's file, filled by draw(size=shape)."""
    shapes = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(L):
        for ln in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{ln}.weight": (C,), f"h.{i}.{ln}.bias": (C,)}
        for name, n_in, n_out in (("attn.c_attn", C, 3 * C), ("attn.c_proj", C, C),
                                  ("mlp.c_fc", C, 4 * C), ("mlp.c_proj", 4 * C, C)):
            shapes |= {f"h.{i}.{name}.weight": (n_in, n_out), f"h.{i}.{name}.bias": (n_out,)}
    return {name: draw(size=shape) for name, shape in shapes.items()}


WEIGHTS = {name: (0.3 * w + name.endswith(("1.weight", "2.weight", "f.weight"))).astype(np.float32)
           for name, w in openai_weights().items()}


def numpy_gpt2(w, tokens):
    """The logits of one row, by the paper and OpenAI's code, in float64."""
    w = {name: array.astype(np.float64) for name, array in w.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
    for i in range(L):
        q, k, v = np.split(linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=-1)
        out = np.zeros_like(q)
        for head in range(H):
            part = slice(head * C // H, (head + 1) * C // H)
            for t in range(len(tokens)):
                e = np.exp(q[t, part] @ k[: t + 1, part].T / math.sqrt(C // H))
                out[t, part] = e / e.sum() @ v[: t + 1, part]
        x = x + linear(out, f"h.{i}.attn.c_proj")
        m = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        m = m / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m**3)))
        x = x + linear(m, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def save(path, weights):
    mx.save_safetensors(str(path), {name: mx.array(array) for name, array in weights.items()})
    return str(path)


@pytest.fixture
def load_gpt2(tmp_path, monkeypatch):
    """README's own function, with a copy of train.py to which README's diff was applied."""
    (tmp_path / "train.py").write_text(apply(PART)[1], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("train", tmp_path / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "train", module)
    names = {}
    exec(blocks_of(PART, "python")[0], names)
    return names["load_gpt2"]


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_logits_are_those_of_gpt2(load_gpt2, tmp_path, prefix):
    buffers = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, T, T), np.float32)) for i in range(L)}
    path = save(tmp_path / "gpt2.safetensors",
                {prefix + name: array for name, array in {**WEIGHTS, **buffers}.items()})
    model = load_gpt2(path, n_heads=H)
    x = np.random.default_rng(1).integers(0, V, (2, T))
    logits = np.array(model(mx.array(x)))
    assert logits.shape == (2, T, V)
    for row in range(2):
        expected = numpy_gpt2(WEIGHTS, x[row])
        assert np.abs(expected).max() > 1
        assert np.abs(logits[row] - expected).max() < 1e-4
    greedy = list(model.generate([1, 2], 5, temperature=0))
    assert greedy[0] == numpy_gpt2(WEIGHTS, [1, 2])[-1].argmax() and len(greedy) == 5


def test_logits_are_those_of_hugging_face(load_gpt2, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H)).eval()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
        x = torch.randint(0, V, (2, T))
        expected = other(x).logits.numpy()
    weights = {name: w.numpy() for name, w in other.state_dict().items() if "lm_head" not in name}
    model = load_gpt2(save(tmp_path / "gpt2.safetensors", weights), n_heads=H)
    assert np.abs(np.array(model(mx.array(x.numpy()))) - expected).max() < 1e-4


@pytest.mark.parametrize("name, shape", [
    ("wte.weight", None), ("wpe.weight", (T,)), ("h.1.attn.c_attn.weight", (C, 3 * C + 1)),
    ("h.2.mlp.c_fc.bias", None), ("h.0.attn.c_proj.weight", (C, C + 1)), ("ln_f.bias", (C - 1,))])
def test_a_file_that_does_not_fit(load_gpt2, tmp_path, name, shape):
    weights = {n: a for n, a in WEIGHTS.items() if n != name}
    if shape:
        weights[name] = np.zeros(shape, np.float32)
    ours = name.replace("h.", "blocks.", 1).replace(".attn.", ".mha.").replace("c_attn", "[qkv]_proj")
    with pytest.raises(ValueError, match=f"bad.safetensors: {ours} is not there, or no"):
        load_gpt2(save(tmp_path / "bad.safetensors", weights), n_heads=H)


def test_sizes():
    """The parameters that README and train.py state, from the shapes alone."""
    class Shape:
        def __init__(self, size):
            self.size = math.prod(size)
    smallest = openai_weights(50257, 768, 12, 1024, Shape)
    count = sum(array.size for array in smallest.values())
    assert count == 124_439_808 and "124,439,808" in PART
    assert round(4 * count / 1e6, -1) == 500 or 4 * count < 548e6  # and the buffers of the masks
    assert 4 * (count + 12 * 1024**2) < 548.2e6


def test_training_still_runs(tmp_path):
    folder = Folder(tmp_path, source=apply(PART)[1], num_epochs=1)
    result = folder.run()
    assert result.returncode == 0 and re.search(r"^Epoch 0 \| ", result.stdout, re.M)
    assert folder.run("--sample", "7").returncode == 0
