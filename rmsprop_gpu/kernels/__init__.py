"""The rule, the norms, the loops around them on the CPU and on CUDA, and what they stand on.

It may import `arrays`. `rule.py` is the mathematics of a step, once; nothing else in the package knows it.
"""
