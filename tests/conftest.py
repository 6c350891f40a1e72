"""Options of the test suite."""

from __future__ import annotations

import os

import kernels
import pytest
import torch

from initaudit.measure import fused

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


@pytest.fixture(scope="session")
def kernel(tmp_path_factory):
    """The extension as it is in the sources now, whatever is installed."""
    return kernels.built(tmp_path_factory.mktemp("kernel"), tmp_path_factory.mktemp("compiler"))


@pytest.fixture(params=["plain", "AVX2", "AVX-512"])
def fast(request, kernel, monkeypatch):
    """The package with the pass in C, for each instruction set that this processor has."""
    at = ["plain", "AVX2", "AVX-512"].index(request.param)
    if at >= kernel.LEVELS:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(fused, "kernel", kernel)
    monkeypatch.setattr(fused, "level", at)
