"""Reports with made-up numbers, as if `profile` had measured them on an idle machine."""

from rmsprop_gpu.profiling import Ceilings, Launch, Report, Times
from rmsprop_gpu.profiling.results import Code

CODE = Code(40, 8, 4, 6, 0.75, "the vector loop", {"float32": 30, "memory": 5})


def times(median, q1=None, q3=None):
    """Five repeats with this median and these quartiles."""
    q1, q3 = q1 or median, q3 or median
    return Times.of([q3, q1, median, q1, q3])


LAUNCH = {
    "name": "update_kernel[float32, plain]", "device": "cpu", "variant": "plain", "dtype": "float32",
    "grad_dtype": "float32",
    "compute_dtype": "float32", "tensors": 2, "elements": 1000, "chunks": 2, "grid": None, "block": None,
    "bytes_per_element": 20, "bytes": 20_000, "flops_per_element": 9, "seconds": times(2e-6, 1e-6, 3e-6),
    "copies": times(2.5e-6), "copied": 20_000, "code": None,
}  # fmt: skip


def made(launches=({},), memory_rate=5e10, flop_rates=None, **changes):
    ceilings = Ceilings(memory_rate, flop_rates or {"float32": 2e11}, 1.0)
    given = {
        "optimizer": "RMSProp", "device": "a <processor>", "repeats": 5, "host": times(1.5e-6, 1e-6, 2e-6),
        "device_times": times(2.5e-6, 2e-6, 3e-6), "launches": [Launch(**{**LAUNCH, **launch}) for launch in launches],
        "before": ceilings, "after": ceilings, "skipped": 0,
    }  # fmt: skip
    return Report(**{**given, **changes})


BEFORE = made(host=times(1e-6), device_times=times(9e-6))
AFTER = made(
    [{"seconds": times(1e-6), "copies": times(1.25e-6)}, {"name": "update_kernel[float32, momentum]"}],
    host=times(1e-6), device_times=times(4e-6),
)  # fmt: skip
BUSY = made(after=Ceilings(5e10, {"float32": 2e11}, 0.5))


def rows(text):
    """The cells of each row by its first cell. Columns are two spaces apart."""
    found = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in found if len(cells) > 1}
