"""The catalogue: every initialization scheme that is recognised, with its formula and its source.

A scheme is a function from a `Site` to the laws it would have drawn this weight from. Adding one is adding a function to the
file of its family; its name begins with one of `FIRST_WORDS`, and parameters stand in brackets.
"""

from __future__ import annotations

import math
from functools import lru_cache

from initaudit.expect import schemes_by_fan, schemes_fixed
from initaudit.expect.scheme import Scheme, Site, site_of

__all__ = ["FIRST_WORDS", "Scheme", "Site", "catalogue", "site_of"]

FIRST_WORDS = (
    *("kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform", "lecun_normal", "lecun_uniform"),
    *("pytorch_default", "normal", "trunc_normal", "uniform", "orthogonal", "delta_orthogonal", "identity", "dirac"),
    *("sparse", "zeros", "ones", "constant"),
)


@lru_cache(maxsize=64)
def catalogue(site: Site) -> tuple[Scheme, ...]:
    """Every scheme for this site, each name once; where two makers give a name, the first counts."""
    found: dict[str, Scheme] = {}
    for maker in (*schemes_by_fan.MAKERS, *schemes_fixed.MAKERS):
        for scheme in maker(site):
            if scheme.distribution == "constant" or 0 < scheme.variance < math.inf:
                found.setdefault(scheme.name, scheme)
    return tuple(found.values())
