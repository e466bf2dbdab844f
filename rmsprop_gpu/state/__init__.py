"""What an optimizer keeps, how it goes out and how it comes in, from other frameworks too.

`optimizer` and whatever stands above it may import it.
"""
