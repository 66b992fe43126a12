"""One tiny model and its guards for all tests of the server."""

from __future__ import annotations

import pytest
from local_server import Reference, guards_of, tiny_model


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    model = tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    return Reference(model, guards_of(model))
