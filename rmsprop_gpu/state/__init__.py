"""What an optimizer keeps, how it goes out and how it comes in, from other frameworks too.

It may import `conventions`, `steps` and what these stand on.
"""
