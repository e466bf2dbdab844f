"""The notebook about torch runs where torch is."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("torch") else ["04_in_torch.ipynb"]
