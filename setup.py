"""Build the compiled modules: every .pyx below fastq/ becomes one extension of the same dotted name.

Everything else about the distribution stands in pyproject.toml. Switches, read from the environment:

FASTQ_DEBUG=1     all of Cython's run-time checks and line tracing, no optimisation
FASTQ_QUICK=1     no optimisation: built in a third of the time, for tests of what does not depend on it
FASTQ_SANITIZE=1  with FASTQ_DEBUG=1, also the address and undefined-behaviour sanitizers
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEBUG = os.environ.get("FASTQ_DEBUG") == "1"
QUICK = os.environ.get("FASTQ_QUICK") == "1"
SANITIZE = DEBUG and os.environ.get("FASTQ_SANITIZE") == "1"
FLAVOUR = "sanitize" if SANITIZE else "debug" if DEBUG else "release"

# A module that declares something of <amqp.h> is the one that needs the library.
USES_LIBRABBITMQ = re.compile(r'cdef extern from [<"]+amqp')

MISSING_LIBRABBITMQ = """
fastq needs the C library librabbitmq and its headers, and <amqp.h> was not found.
  Debian, Ubuntu:  apt-get install librabbitmq-dev
  Fedora, RHEL:    dnf install librabbitmq-devel
  macOS:           brew install rabbitmq-c
Install it and build again. If it is installed elsewhere, name the folders in CFLAGS=-I... and LDFLAGS=-L...
"""


def compile_flags() -> list[str]:
    """Return the C compiler's options for this flavour."""
    common = ["-fno-strict-aliasing", "-Wno-unreachable-code"]
    if QUICK and not DEBUG:
        return [*common, "-O0", "-g0", "-U_FORTIFY_SOURCE"]
    if not DEBUG:
        # -g1: line numbers in a crash's stack dump cost disk space only.
        # Python's own build may define _FORTIFY_SOURCE already; a second value would be a warning.
        return [*common, "-O2", "-g1", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong"]
    flags = [*common, "-O0", "-g", "-U_FORTIFY_SOURCE"]
    if SANITIZE:
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    return flags


def link_flags() -> list[str]:
    """Return the linker's options for this flavour and system."""
    flags = ["-Wl,-z,relro,-z,now"] if sys.platform.startswith("linux") else []
    return [*flags, "-fsanitize=address,undefined"] if SANITIZE else flags


def directives() -> dict[str, Any]:
    """Return Cython's directives; a module that is measured to need others says so itself."""
    chosen: dict[str, Any] = {"language_level": 3, "embedsignature": True, "freethreading_compatible": False}
    if DEBUG:
        chosen |= {"boundscheck": True, "wraparound": True, "nonecheck": True, "initializedcheck": True}
        chosen |= {"overflowcheck": False, "linetrace": True}  # hash and ring arithmetic wraps on purpose
    return chosen


def pkg_config(option: str) -> list[str]:
    """Return what pkg-config says about librabbitmq; [] where it is not there or does not know."""
    command = ["pkg-config", option, "librabbitmq"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


def extension(path: Path) -> Extension:
    """Return the extension for one .pyx file."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    source = path.read_text(encoding="utf-8")
    needs_library = USES_LIBRABBITMQ.search(source) is not None
    # Timers are in a library of their own before glibc 2.34; later that one is empty.
    system = ["rt"] if "timer_create" in source else []
    return Extension(
        name,
        [str(path.relative_to(ROOT))],
        libraries=["rabbitmq", *system] if needs_library else system,
        extra_compile_args=compile_flags() + (pkg_config("--cflags") if needs_library else []),
        extra_link_args=link_flags() + (pkg_config("--libs-only-L") if needs_library else []),
        define_macros=[("CYTHON_TRACE", "1")] if DEBUG else [],
    )


class BuildExtensions(build_ext):
    """Run Cython, then the C compiler, on all modules side by side."""

    def finalize_options(self) -> None:
        """Translate the .pyx files; here and not at import, so that reading metadata needs no compiler."""
        if isinstance(self.distribution.ext_modules, list):
            self.distribution.ext_modules = self.translate(self.distribution.ext_modules)
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()
        self.build_temp = os.path.join(self.build_temp, FLAVOUR)
        # Object files look up to date whatever options made them, so a change of flavour builds everything.
        self.force = self.force or self.last_flavour() != FLAVOUR

    def translate(self, extensions: list[Extension]) -> list[Extension]:
        """Return the same extensions over generated C; the C goes below build/, apart for each flavour."""
        if all(source.endswith(".c") for ext in extensions for source in ext.sources):
            return extensions
        from Cython.Build import cythonize

        translated: list[Extension] = cythonize(
            extensions,
            build_dir=os.path.join("build", "cython", FLAVOUR),
            compiler_directives=directives(),
            nthreads=os.cpu_count() or 1,
            quiet=True,
        )
        return translated

    def last_flavour(self) -> str:
        """Return the flavour of the objects that are there now."""
        stamp = ROOT / "build" / "flavour"
        return stamp.read_text(encoding="utf-8") if stamp.exists() else FLAVOUR

    def build_extensions(self) -> None:
        """Compile; stop with one clear message where librabbitmq is missing."""
        if any("rabbitmq" in ext.libraries for ext in self.extensions):
            self.require_librabbitmq()
        super().build_extensions()
        stamp = ROOT / "build" / "flavour"
        stamp.parent.mkdir(exist_ok=True)
        stamp.write_text(FLAVOUR, encoding="utf-8")

    def require_librabbitmq(self) -> None:
        """Stop the build unless the compiler finds <amqp.h>."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.c")
            probe.write_text("#include <amqp.h>\nint probe(void) { return AMQP_VERSION_MAJOR; }\n", encoding="utf-8")
            command = [*getattr(self.compiler, "compiler_so", ["cc"]), *pkg_config("--cflags")]
            checked = subprocess.run(
                [*command, "-c", str(probe), "-o", str(Path(folder, "probe.o"))], capture_output=True, text=True
            )
        if checked.returncode != 0:
            raise SystemExit(MISSING_LIBRABBITMQ)


setup(
    ext_modules=[extension(path) for path in sorted((ROOT / "fastq").rglob("*.pyx"))],
    cmdclass={"build_ext": BuildExtensions},
)
