"""The shared library: finding it, joining it to torch's OpenMP runtime, choosing an instruction set."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch

#: The version of the library's interface that this driver speaks; OPTWATCH_ABI in plan.cpp.
ABI = 5
#: Forces an instruction set below the best one: ``avx512``, ``avx2``, ``baseline`` or ``neon``.
ISA_VARIABLE = "OPTWATCH_CPU_ISA"

NAME = "liboptwatch_cpu.so"
#: kMaxSlots and kMaxBuffers of tables.h.
MAX_SLOTS, MAX_BUFFERS = 4, 4


def _find() -> Path:
    """The library beside this file, or where an editable install puts what it builds."""
    beside = Path(__file__).with_name(NAME)
    folders = [Path(folder) for folder in sys.modules[__package__ or "optwatch.kernels.cpu"].__path__]
    return next((folder / NAME for folder in folders if (folder / NAME).exists()), beside)


PATH = _find()

_POINTER = ctypes.c_void_p
_STRING = ctypes.c_char_p
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "optwatch_cpu_has_threads": (ctypes.c_int, ()),
    "optwatch_cpu_isa": (_STRING, (ctypes.c_int,)),
    "optwatch_cpu_has_rule": (ctypes.c_int, (_STRING, _STRING)),
    "optwatch_cpu_has_codec": (ctypes.c_int, (_STRING, _STRING)),
    "optwatch_cpu_has_type": (ctypes.c_int, (_STRING, _STRING)),
    "optwatch_cpu_bind": (
        _POINTER,
        (_STRING, _STRING, ctypes.POINTER(_STRING), _STRING, _STRING, ctypes.c_int64, *(_POINTER,) * 4),
    ),
    "optwatch_cpu_bind_state": (
        _POINTER,
        (
            *(_STRING,) * 2,
            _POINTER,
            ctypes.c_int,
            _POINTER,
            ctypes.POINTER(_STRING),
            *(_STRING,) * 2,
            ctypes.c_int64,
            *(_POINTER,) * 3,
        ),
    ),
    "optwatch_cpu_run_state": (None, (*(_POINTER,) * 3, ctypes.c_int, _POINTER)),
    "optwatch_cpu_run_gradients": (None, (*(_POINTER,) * 2, ctypes.c_int, _POINTER)),
    "optwatch_cpu_run_norms": (None, (*(_POINTER,) * 3, *(ctypes.c_int,) * 2, _POINTER)),
    "optwatch_cpu_run": (None, (*(_POINTER,) * 4, *(ctypes.c_int,) * 3, _POINTER)),
    "optwatch_cpu_gradient_sums": (
        None,
        (_STRING, _STRING, ctypes.c_int64, _POINTER, _POINTER, ctypes.c_int, _POINTER),
    ),
    "optwatch_cpu_free": (None, (_POINTER,)),
}


class LibraryError(Exception):
    """The library cannot be used; the message is the whole reason."""


class Library:
    """The loaded library with one instruction set chosen."""

    def __init__(self, path: Path | None = None) -> None:
        path = path or PATH
        if not path.exists():
            raise LibraryError(
                f"the compiled kernels are missing ({path.name} is not beside its driver): "
                "install optwatch again with a C++17 compiler at hand"
            )
        if sys.byteorder != "little":
            raise LibraryError("the compiled kernels need a little-endian processor")
        share_openmp()
        try:
            self.c = ctypes.CDLL(str(path))
            abi = int(self.c.optwatch_cpu_abi())
        except (OSError, AttributeError) as error:
            raise LibraryError(f"{path.name} cannot be loaded: {error}") from error
        if abi != ABI:
            raise LibraryError(
                f"{path.name} is of another version (interface {abi}, this driver speaks {ABI}): build optwatch again"
            )
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments
        self.isas = self._supported()
        self.isa = self._chosen()

    @property
    def threaded(self) -> bool:
        """Whether an OpenMP runtime was found; otherwise steps run on the calling thread."""
        return bool(self.c.optwatch_cpu_has_threads())

    def has(self, kind: str, name: str) -> bool:
        """Whether the library has this rule, codec or type (of elements)."""
        return bool(getattr(self.c, f"optwatch_cpu_has_{kind}")(self.isa.encode(), name.encode()))

    def _supported(self) -> list[str]:
        names: list[str] = []
        while (name := self.c.optwatch_cpu_isa(len(names))) is not None:
            names.append(name.decode())
        return names

    def _chosen(self) -> str:
        wanted = os.environ.get(ISA_VARIABLE)
        if not wanted:
            return self.isas[0]
        if wanted not in self.isas:
            raise LibraryError(
                f"{ISA_VARIABLE}={wanted} names no instruction set of this processor: use one of {', '.join(self.isas)}"
            )
        return wanted


def share_openmp() -> None:
    """Make torch's OpenMP runtime visible to libraries loaded later, whichever it is and wherever it lies.

    Torch's wheels carry a runtime of their own under a private name. A second one in the process would mean a second
    set of threads that compete with torch's for the cores.
    """
    for path in openmp_runtimes():
        # Not loaded again: it is mapped already, and only its symbols become global. An unusable one is no reason
        # to fail, because the kernels run without threads as well.
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL | getattr(os, "RTLD_NOLOAD", 0))
        except OSError:
            continue
        return


def openmp_runtimes() -> list[str]:
    """The OpenMP runtimes mapped into this process, torch's own first."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    runtimes = [p for p in paths if Path(p).name.startswith(("libgomp", "libomp", "libiomp"))]
    home = str(Path(torch.__file__).parent)
    return sorted(runtimes, key=lambda path: (not path.startswith(home), path))


@functools.cache
def library() -> Library | LibraryError:
    """The library, or why there is none."""
    try:
        return Library()
    except LibraryError as error:
        return error
