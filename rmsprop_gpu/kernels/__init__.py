"""The rule, the norms, the loops around them on the CPU and on CUDA, and what they build on.

`hyper` and the layers above it may import it. `rule.py` holds the mathematics of a step. The only other module that
contains it is `reference.py`, against which the rule is tested.
"""
