"""Options of the test suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--overwrite", action="store_true", help="renew the golden files and the outputs that the documents show")


@pytest.fixture
def overwrite(request: pytest.FixtureRequest) -> bool:
    """Whether what differs is renewed; what a golden file must hold whatever it says is checked all the same."""
    return bool(request.config.getoption("--overwrite"))
