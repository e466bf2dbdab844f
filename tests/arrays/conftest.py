"""Both ways in which the headers of arrays are checked."""

import pytest

from rmsprop_gpu.steps import headers


@pytest.fixture(params=["compiled", "python"])
def check(request, monkeypatch):
    """The compiled check of all headers, and the Python checks alone, as where the C struct is not as expected."""
    assert headers.TRUSTED
    monkeypatch.setattr(headers, "TRUSTED", request.param == "compiled")
