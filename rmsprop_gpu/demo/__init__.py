"""A small network that learns handwritten digits: the training, its oracle, its report, its command line.

Only `cli` may import it.
"""
