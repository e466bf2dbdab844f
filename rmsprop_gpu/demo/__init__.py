"""A small network that learns handwritten digits: the training, its oracle, its report.

It may import everything but `cli`.
"""
