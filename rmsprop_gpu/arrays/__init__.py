"""What counts as an array, where it is stored, and which backend it belongs to.

Every other wing may import it; it imports none of them. All error messages about arrays are in `checks.py`.
"""
