"""The one thing that pyproject.toml cannot say in a settled form: an extension, left out where it cannot be compiled."""

from setuptools import Extension, setup

KERNEL = "initaudit/measure/kernel"

setup(
    ext_modules=[
        Extension(
            "initaudit.measure._kernel",
            [f"{KERNEL}/kernel.c"],
            depends=[f"{KERNEL}/{name}.h" for name in ("pass", "block", "lanes", "calls")],
            extra_compile_args=["-O3", "-g0"],
            # numpy does the same without it (initaudit/measure/fused.py).
            optional=True,
            # One file for every version of Python; the processor's instruction sets are chosen from when it is loaded.
            py_limited_api=True,
        )
    ]
)
