"""Other frameworks' words, and ours as text: presets, and the update written out.

It may import `hyper` and what that stands on.
"""
