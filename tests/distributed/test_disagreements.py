"""One error on all ranks, with one text; no byte is changed; the next good step is that of one process."""

import pytest
from ranks import needs_mpi, run

pytestmark = needs_mpi


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_disagree(ranks, tmp_path):
    assert run("disagreements", ranks, FOLDER=str(tmp_path / "saved")).count("check_") > 15
