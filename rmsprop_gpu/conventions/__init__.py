"""Other frameworks' conventions, and ours as text: presets, and the update written out.

`state`, `optimizer` and the layers above them may import it; `steps` may not.
"""
