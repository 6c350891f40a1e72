"""The states of every generator that a model's code may draw from, kept or set for a while."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """The states of Python's, NumPy's and torch's generators afterwards are those of before; inside they start at `seed`."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)
                torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
