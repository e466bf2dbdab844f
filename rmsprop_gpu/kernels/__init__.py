"""The rule, the norms, the loops around them on the CPU and on CUDA, and what they stand on.

`hyper` and whatever stands above it may import it. `rule.py` is the mathematics of a step, which no other module of
ours knows, but for `reference.py`, against which it is held.
"""
