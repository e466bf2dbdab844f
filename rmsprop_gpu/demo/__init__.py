"""A small network that learns handwritten digits: training, oracle, report and command line.

Only `cli` may import it.
"""
