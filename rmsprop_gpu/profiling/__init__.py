"""What a step launches, moves and takes, beside a copy of as many bytes; the model of its traffic; its machine code.

`demo` and `cli` may import it. `profile` here is the function: its module is `measure`.
"""

from .measure import annotate, profile
from .report import Report
from .results import Ceilings, Launch, Times

__all__ = ["Ceilings", "Launch", "Report", "Times", "annotate", "profile"]
