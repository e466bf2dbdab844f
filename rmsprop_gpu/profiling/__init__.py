"""What a step launches and moves and how long it takes, beside a copy of the same size; its traffic and machine code.

`demo` and `cli` may import it. `profile` here is the function: its module is `measure`.
"""

from .comparison import Comparison, compare
from .machine_code import read_machine_code
from .measure import annotate, profile
from .report import Report
from .results import Ceilings, Launch, Times
from .sizes import Sizes, profile_sizes

__all__ = [
    "Ceilings",
    "Comparison",
    "Launch",
    "Report",
    "Sizes",
    "Times",
    "annotate",
    "compare",
    "profile",
    "profile_sizes",
    "read_machine_code",
]
