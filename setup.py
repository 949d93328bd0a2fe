"""Builds the three C modules; everything else stands in pyproject.toml."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

# -O3 lets the compiler vectorise the scan loops. FASTSMTP_CFLAGS is for sanitizer builds.
FLAGS = ["-O3", *os.environ.get("FASTSMTP_CFLAGS", "").split()]

EXTENSIONS = [
    Extension(f"fastsmtp.{name}", [f"fastsmtp/{name}.pyx"], extra_compile_args=FLAGS, extra_link_args=FLAGS)
    for name in ("_parser", "_files", "_shared")
]

setup(
    ext_modules=cythonize(
        EXTENSIONS,
        compiler_directives={
            "language_level": "3",
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
        },
    )
)
