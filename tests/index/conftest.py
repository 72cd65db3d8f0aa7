"""Where the indexes of these tests lie."""

import pytest


@pytest.fixture
def uri(root_uri: str) -> str:
    """Of an index that is not there yet."""
    return f"{root_uri}/indexes/photos"
