"""Weight formats: proofs over every sign, exponent and mantissa of a bf16."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from optwatch.codecs import CORRECTION, VALUES, WEIGHTS, Codec, weight_codec
from tests.codecs.samples import CPU, every_upper_half, floats, round_trip, uniform

SPLIT = [WEIGHTS["split8"], WEIGHTS["split16"]]
LARGEST = torch.finfo(torch.bfloat16).max
EVERY_BF16 = torch.arange(65536).to(torch.int16).view(torch.bfloat16)


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


def same(left: Tensor, right: Tensor) -> bool:
    """Equal in every bit, or NaN both."""
    return bool(((bits(left) == bits(right)) | (left.isnan() & right.isnan())).all())


def test_split16_is_exact() -> None:
    """Every upper half with the lower halves around each change; all lower halves at the ends of the exponents."""
    exponents, mantissas = (0, 1, 2, 127, 253, 254, 255), (0, 1, 0x7E, 0x7F)
    ends = [s << 15 | e << 7 | m for s, e, m in itertools.product((0, 1), exponents, mantissas)]
    for values in (every_upper_half(), floats(torch.tensor(ends), torch.arange(65536))):
        stored, _ = round_trip(WEIGHTS["split16"], values)
        assert same(stored, values)


def test_split8_keeps_24_bits() -> None:
    """What is stored is one of the two neighbours: within 2**-15 of any normal number, 2**-141 of a subnormal."""
    values = every_upper_half()
    stored, _ = round_trip(WEIGHTS["split8"], values)
    finite = stored.isfinite()
    assert torch.equal(stored.isnan(), values.isnan())
    assert (values.isinf() <= stored.isinf()).all()
    assert (values[~finite & ~values.isnan()].abs() > LARGEST).all()
    error = (stored.double() - values.double()).abs()[finite]
    assert (error < (values.double().abs()[finite] * 2.0**-15).clamp(min=2.0**-141)).all()
    apart = (bits(stored) - bits(values)).abs()[finite]
    assert apart.max() < 256
    assert (bits(stored)[finite] & 255 == 0).all()


@pytest.mark.parametrize("lower", [0, 1, 0x80, 0xFE, 0xFF])
@pytest.mark.parametrize("upper", [0x0000, 0x007F, 0x3F80, 0xBFFF, 0x7F00])
def test_split8_is_unbiased(upper: int, lower: int) -> None:
    """Over all random numbers, the share of those rounded away from zero is how far away it is."""
    values = floats(torch.tensor([upper]), torch.tensor([lower])).repeat(65536)
    buffers = WEIGHTS["split8"].allocate(65536, CPU)
    stored = WEIGHTS["split8"].store(values, buffers, torch.arange(65536).float())
    assert int((bits(stored) != bits(values) & -256).sum()) == lower * 256


@pytest.mark.parametrize("codec", SPLIT, ids=repr)
def test_the_parameter_is_the_nearest_bf16(codec: Codec) -> None:
    """Torch's own rounding, but for a tie, which goes away from zero; and a NaN is one."""
    values = every_upper_half()
    stored, buffers = round_trip(codec, values)
    seen, rounded = buffers[VALUES], stored.to(torch.bfloat16)
    tie = bits(stored) & 0xFFFF == 0x8000
    assert torch.equal(seen.isnan(), values.isnan())
    there = ~tie & ~values.isnan()
    assert torch.equal(seen.view(torch.int16)[there], rounded.view(torch.int16)[there])
    away = (bits(stored) + 0x8000).view(torch.float32)
    assert torch.equal(seen.float()[tie & ~values.isnan()], away[tie & ~values.isnan()])


@pytest.mark.parametrize("codec", SPLIT, ids=repr)
def test_a_write_from_outside_is_kept(codec: Codec) -> None:
    """Every bf16 beside a correction that is another's: within half a unit of it, and seen unchanged afterwards."""
    ends = torch.iinfo(codec.buffers[1].dtype)
    for correction in (ends.min, ends.min + 1, -1, 0, 1, ends.max):
        buffers = {
            VALUES: EVERY_BF16.clone(),
            CORRECTION: torch.full((65536,), correction, dtype=codec.buffers[1].dtype),
        }
        weight = codec.load(buffers)
        finite = EVERY_BF16.isfinite()
        assert weight[finite].isfinite().all()
        codec.store(weight.clone(), buffers, uniform(65536))
        assert torch.equal(buffers[VALUES].view(torch.int16)[finite], EVERY_BF16.view(torch.int16)[finite])
        assert torch.equal(buffers[VALUES].isnan(), weight.isnan())
        zero = EVERY_BF16 == 0
        assert (weight[zero].abs() <= torch.finfo(torch.float32).tiny).all()
        assert weight[EVERY_BF16.isnan()].isnan().all()


def test_stochastic_keeps_every_bf16() -> None:
    """What needs no rounding stays; what is not finite stays so, what is finite too."""
    codec = WEIGHTS["stochastic"]
    stored, _ = round_trip(codec, EVERY_BF16.float())
    assert same(stored, EVERY_BF16.float())
    values = every_upper_half()
    stored, _ = round_trip(codec, values)
    assert torch.equal(stored.isfinite(), values.isfinite())
    assert torch.equal(stored.isnan(), values.isnan())
    finite = values.isfinite()
    toward, away = bits(values) & -65536, (bits(values) & -65536) + 65536
    up = (bits(values) & 0xFFFF != 0) & (away & 0x7FFFFFFF < 0x7F800000)
    assert ((bits(stored) == toward) | (bits(stored) == away) & up)[finite].all()


@pytest.mark.parametrize("sign", [0, 0x8000])
def test_stochastic_is_unbiased(sign: int) -> None:
    """Over all random numbers the share of those rounded away from zero is the distance, whatever the sign."""
    codec = WEIGHTS["stochastic"]
    for lower in (0, 1, 12345, 65535):
        values = floats(torch.tensor([0x3F80 | sign]), torch.tensor([lower])).repeat(65536)
        stored = codec.store(values, codec.allocate(65536, CPU), torch.arange(65536).float())
        assert int((stored.abs() > 1).sum()) == lower


def test_an_fp32_parameter_is_exact_in_every_format() -> None:
    """It is its own master weight."""
    for weights in WEIGHTS:
        codec = weight_codec(weights, torch.float32)
        assert [buffer.dtype for buffer in codec.buffers] == [torch.float32]
        assert not codec.stochastic
    with pytest.raises(
        ValueError, match="unknown weight format 'split4': use one of 'native', 'stochastic', 'split8'"
    ):
        weight_codec("split4", torch.bfloat16)


@pytest.mark.parametrize("codec", [c for c in WEIGHTS.values() if c.stochastic], ids=repr)
def test_random_numbers_are_asked_for(codec: Codec) -> None:
    """A format that rounds stochastically says so."""
    with pytest.raises(
        ValueError, match=f"{codec.name} rounds stochastically: store\\(\\) needs random numbers"
    ):
        codec.store(torch.ones(2), codec.allocate(2, CPU))
