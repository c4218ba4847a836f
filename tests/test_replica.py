"""tests/lab/replica.py, in PyTorch, computes what train.py computes, given the same weights."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import train
from mlx.utils import tree_flatten, tree_map

torch = pytest.importorskip("torch")

import replica  # noqa: E402


def in_replicas_names(tree):
    """Arrays of train.py in the names of the replica, which has q, k, and v in one matrix."""
    arrays = {name: torch.tensor(np.array(array)) for name, array in tree_flatten(tree)}
    renamed = {}
    for name, array in arrays.items():
        if ".attn.q_proj." in name:
            parts = [arrays[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            renamed[name.replace("attn.q_proj", "qkv")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            name = name.replace("attn.c_proj", "attn_c_proj")
            renamed[name.replace("mlp.c_proj", "mlp_c_proj").replace("mlp.c_fc", "c_fc")] = array
    return renamed


def test_loss_and_gradients_are_those_of_train():
    mx.random.seed(1)
    model = train.GPT(train.GPTConfig(11, 12, 16, 2, 2, 0.0))
    model.update(tree_map(lambda a: a + 0.1 * mx.random.normal(a.shape), model.parameters()))
    twin = replica.GPT(11, SimpleNamespace(n_emb=16, ctx_len=12, n_layers=2, n_heads=2))
    twin.load_state_dict(in_replicas_names(model.parameters()))

    x, y = np.random.default_rng(0).integers(0, 11, (2, 4, 12))
    loss, grads = nn.value_and_grad(model, train.loss_fn)(model, mx.array(x), mx.array(y))
    twins_loss = twin(torch.tensor(x), torch.tensor(y))
    twins_loss.backward()
    assert twins_loss.item() == pytest.approx(loss.item(), abs=1e-6)
    wanted = in_replicas_names(grads)
    for name, weight in twin.named_parameters():
        np.testing.assert_allclose(weight.grad, wanted[name], atol=1e-6, err_msg=name)
