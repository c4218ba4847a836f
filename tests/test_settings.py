"""What a Mac user runs: both sets of settings, and a compiled step of the default model."""

import re

import mlx.core as mx
import pytest
from helpers import ROOT, SOURCE, TEXT, TINY, epochs, missing, module_from
from helpers import with_settings

README = (ROOT / "README.md").read_text(encoding="utf-8")


def forced(small):
    """The source with its settings for the small model, or for the default one."""
    source, n = re.subn(r"^small = .*$", f"small = {small}", SOURCE, flags=re.M)
    return source if n == 1 else missing("train.py has no line that begins with small =")


@pytest.fixture(params=[True, False], ids=["small", "default"])
def sized(request):
    return module_from(forced(request.param))


def test_every_setting_is_there_and_makes_sense(sized):
    assert {*TINY, "small"} <= set(sized.SETTINGS)
    sized.check_settings(sized.SETTINGS)


def test_the_models_have_the_sizes_that_the_readme_names(sized):
    config = {name: getattr(sized, name) for name in ("ctx_len", "n_emb", "n_heads", "n_layers")}
    n = sized.count_parameters(sized.GPT(sized.GPTConfig(65, **config, dropout=sized.dropout)))
    if f"{n:,}" not in README:
        missing(f"the README names no model of {n:,} parameters")
    if sized.small and n >= 100_000 or not sized.small and n <= 400_000:
        missing(f"{n:,} parameters are another model")


def test_the_default_settings_are_those_of_the_replica():
    """Those of the small model are compared with what the README shows, in test_readme.py."""
    source = (ROOT / "tests" / "lab" / "replica.py").read_text(encoding="utf-8")
    call = re.search(r"^settings = (dict\(.*?\))$", source, re.M | re.S)[1]
    module, theirs = module_from(forced(False)), eval(call)
    changed = [f"{name} {theirs[name]} to {getattr(module, name, None)}" for name in theirs
               if name in TINY and getattr(module, name, None) != theirs[name]]
    if changed:
        missing(f"not the settings of the replica: {', '.join(changed)}")


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
