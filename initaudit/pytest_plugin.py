"""The pytest plugin: the fixture `initaudit`. It is loaded in every run of pytest, so it imports next to nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from initaudit.testing import Auditor


@pytest.fixture
def initaudit(request: pytest.FixtureRequest) -> Auditor:
    """Audits models under the project's configuration: assert_trainable(model, inputs), expect_init(model, "gpt2")."""
    from initaudit.testing import Auditor

    return Auditor(request.config.rootpath)
