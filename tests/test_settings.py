"""What a Mac user runs: both sets of settings, and a compiled step of the default model."""

import re

import mlx.core as mx
import pytest
from helpers import ROOT, SOURCE, TEXT, TINY, epochs, forced, missing, module_from, with_settings

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("small", [True, False])
def test_settings_make_sense_and_give_a_model_that_the_readme_names(small):
    module = module_from(forced(small))
    assert {*TINY, "small"} <= set(module.SETTINGS)
    module.check_settings(module.SETTINGS)
    config = {name: getattr(module, name) for name in ("ctx_len", "n_emb", "n_heads", "n_layers")}
    n = module.count_parameters(module.GPT(module.GPTConfig(65, **config, dropout=0.0)))
    if f"{n:,}" not in README or small == (n > 100_000):
        missing(f"the README names no such model of {n:,} parameters")


def test_the_default_settings_are_those_of_the_replica():
    """Those of the small model are compared with what the README shows, in test_readme.py."""
    source = (ROOT / "tests" / "lab" / "replica.py").read_text(encoding="utf-8")
    theirs = eval(re.search(r"^settings = (dict\(.*?\))$", source, re.M | re.S)[1])
    module = module_from(forced(False))
    changed = [name for name in theirs if getattr(module, name, theirs[name]) != theirs[name]]
    if changed:
        missing(f"the replica has other values of {', '.join(changed)}")


@pytest.mark.parametrize("kind", [mx.cpu, mx.gpu])
def test_the_small_model_and_two_cores_are_for_machines_without_a_gpu(kind, monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(kind))
    module = module_from(SOURCE)
    assert (module.loss_fn.__name__ == "loss_fn") == (kind == mx.gpu)  # and not a wrapper of it
    if module.small != (kind == mx.cpu):
        missing(f"small is {module.small} where the device is {kind}")


def test_the_default_model_trains_in_a_compiled_step(folder, compiled):
    module = module_from(forced(False))
    length = max((module.batch_size + 3) * module.ctx_len * 10 // 9, 12 * module.ctx_len)
    folder.write("input.txt", TEXT * (length // len(TEXT) + 1))
    folder.write("train.py", with_settings(forced(False), num_epochs=1, max_new_tokens=20))
    result = folder.run(compiled=True)
    assert result.returncode == 0 and epochs(result.stdout) == [0], result.stderr
    assert "Warning" not in result.stdout
