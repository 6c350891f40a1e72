"""Options of the test suite."""

from __future__ import annotations

import os

import pytest
import torch

# No test may be passed by what another run has kept, nor write where the user's own reports are.
os.environ["INITAUDIT_CACHE_DIR"] = ""


def _make_torchvision_importable() -> object:
    """Declares the operators that torchvision looks up at import, where its compiled ones do not fit the installed torch.

    transformers and timm import torchvision where it is installed. Returns what keeps the declarations alive.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        for name in ("roi_align", "_roi_align_backward", "deform_conv2d"):
            library.define(name + "(Tensor x) -> Tensor")
        return library
    return None


_TORCHVISION = _make_torchvision_importable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--overwrite", action="store_true", help="renew the golden files and the outputs that the documents show")


@pytest.fixture
def overwrite(request: pytest.FixtureRequest) -> bool:
    """Whether what differs is renewed; what a golden file must hold whatever it says is checked all the same."""
    return bool(request.config.getoption("--overwrite"))
