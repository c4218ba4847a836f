"""What a Mac user runs: both sets of settings, and a compiled step of the default model."""

import ast
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


def values(module):
    return {name: getattr(module, name) for name in module.SETTINGS}


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


def compare(ours, theirs, where):
    assert len(theirs) >= 10
    changed = [f"{name} {theirs[name]} to {ours.get(name)}" for name in theirs
               if name in TINY and ours.get(name) != theirs[name]]
    if changed:
        missing(f"not the settings of {where}: {', '.join(changed)}")


def test_the_default_settings_are_those_of_the_replica():
    source = (ROOT / "tests" / "lab" / "replica.py").read_text(encoding="utf-8")
    [call] = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)
              and getattr(node.targets[0], "id", "") == "settings"]
    theirs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    compare(values(module_from(forced(False))), theirs, "the replica")


def test_the_small_settings_are_those_that_the_readme_shows():
    shown = dict(re.findall(r"\b(\w+)=([\d.]+)(?=[,\n])", README))
    if len(shown) < 10:
        missing("the README shows no settings")
    ours = values(module_from(forced(True)))
    compare(ours, {name: float(value) for name, value in shown.items()}, "the README")
    assert not [name for name in ("max_new_tokens", "top_k") if name not in ours]


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
