"""Records which parameters torch's own function updates, whichever class calls it."""

import pytest


@pytest.fixture
def left(monkeypatch):
    """The ids of the parameters that torch's own function has updated. Clear it at will."""
    rmsprop = pytest.importorskip("torch.optim.rmsprop")
    seen = set()

    def spy(run):
        def spying(params, *args, **kwargs):
            seen.update(map(id, params))
            run(params, *args, **kwargs)

        return spying

    for name in ("_single_tensor_rmsprop", "_multi_tensor_rmsprop"):
        monkeypatch.setattr(rmsprop, name, spy(getattr(rmsprop, name)))
    return seen
