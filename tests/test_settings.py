"""What a Mac user runs: both sets of settings, and a compiled step of the default model."""

import re

import mlx.core as mx
import pytest
from helpers import ROOT, SOURCE, TEXT, TINY, edited, epochs, missing, module_from, with_settings

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL, DEFAULT = (edited(SOURCE, (r"^small = .*$", f"small = {small}")) for small in (True, False))
