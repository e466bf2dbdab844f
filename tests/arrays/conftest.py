"""Both ways to check the headers of arrays."""

import pytest

from rmsprop_gpu.steps import headers


@pytest.fixture(params=["compiled", "python"])
def check(request, monkeypatch):
    """The compiled check of all headers, or Python checks alone, as when the C struct is not as expected."""
    assert headers.TRUSTED
    monkeypatch.setattr(headers, "TRUSTED", request.param == "compiled")
