"""The first run on a card: ``python -m benchmarks.gpu`` (see ../README.md).

``__main__.py`` runs one part after another, each in its own process (``processes.py``), and ``summary.py`` writes down
what they found. A part (``part.py``) is a module that records its findings (``measuring.py``: ``versions``, ``bits``,
``uploads``, ``speed``, ``chunks``) or another program (``programs.py``, ``tools.py``).
"""
