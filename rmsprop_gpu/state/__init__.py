"""What an optimizer keeps, and how it is saved and loaded, also from other frameworks.

`optimizer` and the layers above it may import it.
"""
