"""What counts as an array, where it lies, and which backend it belongs to.

Every other wing may import it; it imports nothing of ours. Every refusal about arrays is worded in `checks.py`.
"""
