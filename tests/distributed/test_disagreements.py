"""All ranks raise the same error, no byte changes, and the next valid step matches one process."""

import pytest
from ranks import needs_mpi, run

pytestmark = needs_mpi


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_disagree(ranks, tmp_path):
    assert run("disagreements", ranks, FOLDER=str(tmp_path / "saved")).count("check_") > 15
