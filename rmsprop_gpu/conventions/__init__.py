"""Other frameworks' words, and ours as text: presets, and the update written out.

`state`, `optimizer` and whatever stands above them may import it; `steps` may not.
"""
