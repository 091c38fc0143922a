"""What every test starts from."""

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """A test that starts a process's `main` here configures logging to its own captured stderr."""
    yield
    structlog.reset_defaults()
