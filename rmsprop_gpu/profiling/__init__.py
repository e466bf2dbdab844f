"""What a step launches, moves and takes, beside a copy of as many bytes; the model of its traffic; its machine code.

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
