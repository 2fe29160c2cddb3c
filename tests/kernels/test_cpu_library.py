"""The compiled library: which one is loaded, what it shares with torch, and what is said when it cannot be used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optwatch.codecs import FORMATS, Codec
from optwatch.kernels import PlanSpec
from optwatch.kernels.cpu import CpuBackend
from optwatch.kernels.cpu.library import ISA_VARIABLE, PATH, Library, LibraryError, openmp_runtimes
from optwatch.rules import RULES, Rule

pytestmark = pytest.mark.skipif(
    not PATH.exists(), reason="built without a compiler: there is no library to test"
)

CPU = torch.device("cpu")
CODECS = sorted(
    {codec.name: codec for kinds in FORMATS.values() for codec in kinds.values()}.values(), key=str
)


def spec_of(rule: Rule, codec: Codec | None = None) -> PlanSpec:
    codecs = tuple(codec or FORMATS["fp32"][slot.kind] for slot in rule.slots)
    return PlanSpec(rule, codecs, torch.float32, torch.float32)


def why_not_in_new_process(**environment: str) -> str:
    """What ``why_not`` says of a plain AdamW plan where the environment is another one."""
    script = """
import torch
from optwatch.codecs import FORMATS
from optwatch.kernels import PlanSpec, choose_backend
from optwatch.kernels.cpu import CpuBackend
from optwatch.rules import RULES
rule = RULES["adamw"]
spec = PlanSpec(rule, tuple(FORMATS["int8"][s.kind] for s in rule.slots), torch.float32, torch.float32)
print(CpuBackend().why_not(spec, torch.device("cpu")))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("rule", RULES.values(), ids=str)
def test_every_registered_rule_has_a_kernel_or_a_reason(rule: Rule) -> None:
    """A rule without cpu.h is refused by its name, never by an exception."""
    reason = CpuBackend().why_not(spec_of(rule), CPU)
    assert reason is None or rule.name in reason


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_every_registered_codec_has_a_kernel_or_a_reason(codec: Codec) -> None:
    """A codec without cpu.h is refused by its name."""
    reason = CpuBackend().why_not(spec_of(RULES["adamw"], codec), CPU)
    assert reason is None or codec.name in reason


def test_the_formats_of_the_house_all_have_kernels() -> None:
    """Else the tests of agreement would pass by testing nothing."""
    for name in ("fp32", "bf16", "int8"):
        codecs = tuple(FORMATS[name][slot.kind] for slot in RULES["adamw"].slots)
        for dtype in (torch.float32, torch.bfloat16):
            assert CpuBackend().why_not(PlanSpec(RULES["adamw"], codecs, dtype, dtype), CPU) is None


def test_unsupported_types_and_devices_are_named() -> None:
    """The reason says what is missing."""
    rule = RULES["adamw"]
    codecs = spec_of(rule).codecs
    assert "'float64'" in str(CpuBackend().why_not(PlanSpec(rule, codecs, torch.float64, torch.float32), CPU))
    assert "cuda" in str(CpuBackend().why_not(spec_of(rule), torch.device("cuda")))


def test_a_missing_library_is_a_reason(tmp_path: Path) -> None:
    """Installed without a compiler."""
    with pytest.raises(LibraryError, match="missing"):
        Library(tmp_path / PATH.name)


def test_an_unreadable_library_is_a_reason(tmp_path: Path) -> None:
    """A truncated file, or one built for another machine."""
    broken = tmp_path / PATH.name
    broken.write_bytes(PATH.read_bytes()[:100])
    with pytest.raises(LibraryError, match="cannot be loaded"):
        Library(broken)


@pytest.mark.skipif(
    shutil.which("cc") is None, reason="needs a C compiler to make a library of another version"
)
def test_a_stale_library_is_a_reason(tmp_path: Path) -> None:
    """Left over from another version of the driver."""
    source, stale = tmp_path / "stale.c", tmp_path / PATH.name
    source.write_text("int optwatch_cpu_abi(void) { return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(stale), str(source)], check=True)
    with pytest.raises(LibraryError, match="another version"):
        Library(stale)


def test_an_unknown_instruction_set_names_the_valid_ones() -> None:
    """A misspelt variable is a reason, not an exception, and does not pass silently."""
    reason = why_not_in_new_process(**{ISA_VARIABLE: "avx1024"})
    assert "avx1024" in reason
    assert all(isa in reason for isa in Library().isas)


def test_each_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of this processor's, and the best by itself."""
    isas = Library().isas
    assert Library().isa == os.environ.get(ISA_VARIABLE, isas[0])
    for isa in isas:
        monkeypatch.setenv(ISA_VARIABLE, isa)
        assert Library().isa == isa


@pytest.mark.skipif(sys.platform != "linux", reason="platform: no /proc")
def test_one_openmp_runtime_serves_torch_and_the_kernels() -> None:
    """A second runtime would be a second set of threads that compete with torch's for the cores."""
    script = """
import torch
import optwatch.kernels.cpu.library as lib
torch.set_num_threads(2)
before = set(lib.openmp_runtimes())
loaded = lib.Library()
torch.ones(1 << 20).sum()
assert loaded.threaded, "no OpenMP runtime was found"
assert set(lib.openmp_runtimes()) == before, (before, lib.openmp_runtimes())
print(len(before))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"
    assert len(openmp_runtimes()) == 1
