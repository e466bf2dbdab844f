"""Memory and network traffic per rank, counted."""

import sys

import pytest
from ranks import needs_mpi, run

pytestmark = needs_mpi

# Ranks on one node that use TCP, over the loopback interface.
OVER_TCP = {"MPIR_CVAR_NOLOCAL": "1", "MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}


@pytest.mark.parametrize("ranks", [2, 3])
def test_memory(ranks):
    assert run("costs", ranks).count("check_") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="bytes are counted in /proc/net/dev")
@pytest.mark.parametrize(("ranks", "hypers"), [(2, {}), (3, {}), (3, {"clipnorm": 1.0})])
def test_traffic(ranks, hypers):
    said = run("traffic", ranks, ELEMENTS="2000000", HYPERS=repr(hypers), **OVER_TCP)
    _, model, sent, probed = map(float, said.split())
    assert ranks - 1 <= probed < 1.03 * (ranks - 1)  # these are the bytes that are counted
    least = 2 * (ranks - 1) / ranks * model
    assert least <= sent <= 1.03 * least
