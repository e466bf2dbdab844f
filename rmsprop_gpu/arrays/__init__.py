"""What counts as an array, where it lies, and which backend it belongs to.

It imports nothing of ours. Every refusal about arrays is worded in `checks.py`.
"""
