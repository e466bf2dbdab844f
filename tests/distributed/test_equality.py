"""On any number of ranks, for any gradients: bit-identical to one process that steps with their sum."""

import pytest
from ranks import needs_mpi, run

pytestmark = needs_mpi

# What may depend on the number of ranks. The rest is the same with three.
SOME = ["halves_are_rounded_once", "none_here_and_there", "fewer_elements_than_ranks", "groups", "structures"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_bits_of_one_process(ranks):
    assert len(run("equality", ranks).splitlines()) > 15


@pytest.mark.parametrize("ranks", [4, 7])
def test_bits_of_one_process_on_many_ranks(ranks):
    assert run("equality", ranks, *SOME).count("check_") == len(SOME)
