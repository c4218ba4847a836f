"""tests/lab/replica.py, in PyTorch, computes what train.py computes, given the same weights."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import train
from helpers import named, random_model, random_tokens

torch = pytest.importorskip("torch")

import replica  # noqa: E402


def in_replicas_names(tree):
    """Arrays of train.py in the names of the replica, which has q, k, and v in one matrix."""
    arrays, renamed = named(tree), {}
    for name, array in arrays.items():
        if ".attn.q_proj." in name:
            array = np.concatenate([array, *(arrays[name.replace("q_proj", f"{letter}_proj")]
                                             for letter in "kv")])
        if ".k_proj." not in name and ".v_proj." not in name:
            for ours, theirs in (("attn.q_proj", "qkv"), ("attn.c_proj", "attn_c_proj"),
                                 ("mlp.c_proj", "mlp_c_proj"), ("mlp.c_fc", "c_fc")):
                name = name.replace(ours, theirs)
            renamed[name] = torch.tensor(array, dtype=torch.float32)
    return renamed


def test_loss_and_gradients_are_those_of_train():
    model, x, y = random_model(), random_tokens(4, 12), random_tokens(4, 12, seed=1)
    twin = replica.GPT(11, SimpleNamespace(n_emb=16, ctx_len=12, n_layers=2, n_heads=2))
    twin.load_state_dict(in_replicas_names(model.parameters()))
    loss, grads = nn.value_and_grad(model, train.loss_fn)(model, mx.array(x), mx.array(y))
    twins_loss = twin(torch.tensor(x), torch.tensor(y))
    twins_loss.backward()
    assert twins_loss.item() == pytest.approx(loss.item(), abs=1e-5)
    wanted = in_replicas_names(grads)
    for name, weight in twin.named_parameters():
        np.testing.assert_allclose(weight.grad, wanted[name], atol=1e-5, err_msg=name)
