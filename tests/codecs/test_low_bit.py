"""Formats of a byte or less: every code, the peers' maps and layouts, and what each promises beyond the common."""

from __future__ import annotations

import math

import pytest
import torch

from optwatch.codecs import FORMATS, Kind
from optwatch.codecs.base import pack, unpack
from optwatch.codecs.int4.codec import LEVELS, MIDDLES, POWERS, SCALE_ROUNDING
from optwatch.codecs.int8_dynamic.codec import dynamic_map
from tests.codecs.samples import CPU, round_trip, sample, uniform

POWER, LOG4 = (FORMATS["int4"][kind] for kind in (Kind.SIGNED, Kind.SECOND_MOMENT))
DYNAMIC = FORMATS["int8_dynamic"]
FP8 = FORMATS["fp8"]


class TestPacking:
    """Two codes a byte."""

    def test_every_byte(self) -> None:
        """The even element is the lower half; both ways are inverse on all 256 bytes."""
        every = torch.arange(256, dtype=torch.uint8)
        assert torch.equal(unpack(every), torch.stack([every % 16, every // 16], 1).view(-1))
        assert torch.equal(pack(unpack(every)), every)

    @pytest.mark.parametrize("numel", [0, 1, 2, 3, 4097])
    def test_odd_lengths(self, numel: int) -> None:
        """The missing half of the last byte is zero."""
        codes = uniform(numel) % 16
        packed = pack(codes)
        assert len(packed) == (numel + 1) // 2
        assert torch.equal(unpack(packed, numel), codes.to(torch.uint8))
        assert not unpack(packed)[numel:].any()

    @pytest.mark.parametrize("codec", [POWER, LOG4], ids=str)
    def test_bytes_an_element(self, codec: object) -> None:
        """Both moments together take what torchao's 4-bit AdamW takes, 1.0625 bytes."""
        assert codec.nbytes(1 << 20) == 0.53125 * (1 << 20)


class TestInt4Power:
    """Signed slots."""

    @pytest.mark.parametrize("power", range(4))
    @pytest.mark.parametrize("sign", [1, -1])
    def test_codes_all_decode_and_encode_to_themselves(self, power: int, sign: int) -> None:
        """All sixteen, for every grid and sign of the scale, at many scales."""
        ratios = (0.5, 0.18, 0.11, 0.04)  # means that choose each grid
        for exponent in range(-110, 127, 13):
            levels = LEVELS[power] * sign * 2.0**exponent
            fill = levels[torch.arange(48) % 16] if power == 0 else torch.zeros(48)
            block = torch.cat([levels, fill])
            if power:  # fill up with the level that brings the mean to where the grid is chosen
                want = ratios[power] * 64 * 2.0**exponent - levels.abs().sum()
                level = LEVELS[power][8 + 7] * 2.0**exponent  # code 8
                block[16 : 16 + max(0, round(float(want / level)))] = level * sign
            stored, buffers = round_trip(POWER, block)
            assert torch.equal(stored, block)
            _, second = round_trip(POWER, stored)
            assert torch.equal(second["codes"], buffers["codes"])

    def test_the_nearest_level_is_taken(self) -> None:
        """Against all sixteen levels, in float64."""
        for spread in (0.0, 0.5, 1.0, 2.0, 3.0):
            values = sample(Kind.SIGNED, 1 << 14) * torch.exp(
                spread * sample(Kind.SIGNED, 1 << 14, 1.0).flip(0)
            )
            stored, buffers = round_trip(POWER, values)
            bits = buffers["scale"].view(torch.int16).int()
            scale = ((bits & -4) << 16).view(torch.float32).repeat_interleave(64).double()
            levels = LEVELS[(bits & 3).long()].repeat_interleave(64, 0).double() * scale[:, None]
            nearest = (levels - values.double()[:, None]).abs().amin(1)
            error = (stored.double() - values.double()).abs()
            assert (error <= nearest + 1e-6 * scale.abs()).all()

    def test_a_heavy_tail_chooses_a_steep_grid(self) -> None:
        """Each of the four grids is for some spread of the magnitudes."""
        chosen = []
        for spread in (0.0, 1.0, 2.0, 4.0):
            values = torch.randn(1 << 14, generator=torch.Generator().manual_seed(1))
            values *= torch.exp(spread * torch.randn(1 << 14, generator=torch.Generator().manual_seed(2)))
            _, buffers = round_trip(POWER, values)
            chosen.append((buffers["scale"].view(torch.int16).int() & 3).double().mean().item())
        assert chosen == sorted(chosen)
        assert chosen[0] < 0.2
        assert chosen[-1] > 2.5

    def test_scales_are_rounded_to_nearest(self) -> None:
        """Rounded up, the largest element would grow by a per cent in every step, which m adds up to ten."""
        values = torch.linspace(1, 2, 4097)[:-1].repeat_interleave(64)
        stored, _ = round_trip(POWER, values)
        ratio = (stored / values)[::64].double()
        assert (ratio - 1).abs().max() <= SCALE_ROUNDING * 1.001
        assert abs(ratio.mean() - 1) < 1e-3

    def test_levels(self) -> None:
        """Ascending, exact at both ends, with their middles between them."""
        assert LEVELS.shape == (4, 16)
        for row, middles, power in zip(LEVELS, MIDDLES, POWERS, strict=True):
            assert (row.diff() > 0).all()
            assert row[7] == 0
            assert row[15] == 1
            assert row[0] == -torch.tensor((7 / 8) ** power, dtype=torch.float64).float()
            assert ((row[7:-1] < middles) & (middles < row[8:])).all()


class TestInt4Log:
    """Second moments."""

    def test_codes_all_decode_and_encode_to_themselves(self) -> None:
        """All sixteen, on grids of many widths."""
        for step in (0.01, 0.1, 1.0, 5.0):
            codes = torch.arange(256) % 16
            buffers = LOG4.allocate(256, CPU)
            buffers["codes"].copy_(pack(codes))
            buffers["range"].copy_(torch.tensor([2.0**-40, step]))
            values = LOG4.load(buffers)
            assert values[codes == 0].eq(0).all()
            again, second = round_trip(LOG4, values)
            torch.testing.assert_close(again, values, rtol=1e-5 * max(step, 1) * 14, atol=0)
            same = (unpack(second["codes"]) == codes).double().mean()
            assert same > 0.99  # on a grid point, a last bit decides once in a thousand

    @pytest.mark.parametrize("scale", [1e-15, 1e-4, 1.0, 1e15])
    def test_error_is_less_than_a_code(self, scale: float) -> None:
        """A stored value is one of the two neighbours on the grid, or its end if it lies below."""
        values = sample(Kind.SECOND_MOMENT, 1 << 14, scale).clamp(min=2.0**-126)
        stored, buffers = round_trip(LOG4, values)
        lowest, step = (x.repeat_interleave(256).double() for x in buffers["range"].view(-1, 2).unbind(1))
        apart = (stored.double() / values.double().maximum(lowest)).log2().abs()
        assert (apart <= step * 1.001 + 1e-4).all()
        below = values.double() < lowest * 0.999
        torch.testing.assert_close(stored[below].double(), lowest[below], rtol=1e-5, atol=0)
        assert below.double().mean() < 0.1

    def test_unbiased_in_the_logarithm(self) -> None:
        """The mean logarithm over many random streams is that of the value, where the grid reaches it."""
        values = torch.exp2(torch.linspace(-6, 0, 256)).repeat(64)
        total = sum(round_trip(LOG4, values, seed)[0].double().log2() for seed in range(200))
        error = (total / 200).view(64, 256).mean(0) - values[:256].double().log2()
        assert error.abs().max() < 0.01  # 12,800 draws of a step of 0.43 octaves: 5 sigma

    def test_one_tiny_value_does_not_stretch_the_grid(self) -> None:
        """A value far below the others is kept larger than it is; the others keep their precision."""
        values = torch.exp2(torch.linspace(-2, 0, 256))
        values[7] = 1e-30
        stored, buffers = round_trip(LOG4, values)
        assert buffers["range"][1] < 2
        assert stored[7] > values[7]
        assert stored.amax() == pytest.approx(1.0, rel=1e-5)

    def test_the_largest_value_is_kept(self) -> None:
        """However far above the others: cut off, its update would explode."""
        values = torch.full((256,), 1e-20)
        values[100] = 1e10
        stored, _ = round_trip(LOG4, values)
        torch.testing.assert_close(stored, values, rtol=1e-4, atol=0)


class TestInt8Dynamic:
    """The peers' map."""

    def test_signed_map(self) -> None:
        """256 values, 0 at code 127, 2**i midpoints of decade i for each sign, and 1."""
        table = dynamic_map(Kind.SIGNED)
        assert table.shape == (256,)
        assert (table.diff() > 0).all()
        assert table[127] == 0
        assert table[255] == 1
        assert torch.equal(-table[:127].flip(0), table[128:255])
        assert table[128] == pytest.approx(5.5e-7)
        assert table[129] == pytest.approx(3.25e-6)
        assert table[0] == pytest.approx(-0.99297, abs=1e-5)
        assert [int(((table > 10.0 ** (i - 7)) & (table < 10.0 ** (i - 6))).sum()) for i in range(7)] == [
            2**i for i in range(7)
        ]

    def test_unsigned_map(self) -> None:
        """256 values, 0 at code 0, twice as many midpoints in each decade, and 1."""
        table = dynamic_map(Kind.SECOND_MOMENT)
        assert table.shape == (256,)
        assert (table.diff() > 0).all()
        assert table[0] == 0
        assert table[255] == 1
        assert table[1] == pytest.approx(3.25e-7)
        assert table[2] == pytest.approx(7.75e-7)

    @pytest.mark.parametrize("kind", Kind)
    def test_codes_all_decode_and_encode_to_themselves(self, kind: Kind) -> None:
        """All 256 of a peer's block, at many largest magnitudes; the block has a 1, as theirs have."""
        codec, table = DYNAMIC[kind], dynamic_map(kind)
        for exponent in range(-95, 127, 3):
            buffers = codec.allocate(256, CPU)
            buffers["codes"].copy_(torch.arange(256))
            buffers["absmax"].fill_(1.7 * 2.0**exponent)
            values = codec.load(buffers)
            assert torch.equal(values, table * buffers["absmax"])
            _, again = round_trip(codec, values)
            assert torch.equal(again["codes"], buffers["codes"])
            assert torch.equal(again["absmax"], buffers["absmax"])

    @pytest.mark.parametrize("kind", Kind)
    def test_the_nearest_value_is_taken(self, kind: Kind) -> None:
        """On both sides of the middle of every two neighbours, and anywhere; but never zero for a second moment."""
        codec, table = DYNAMIC[kind], dynamic_map(kind)
        middles = (table[:-1].double() + table[1:].double()) / 2
        values = torch.cat([(middles * (1 - 1e-5)).float(), (middles * (1 + 1e-5)).float(), torch.ones(2)])
        for chunk in (values[:255], values[255:510], sample(kind, 255, 0.1).clamp(-1, 1)):
            block = torch.cat([chunk, torch.ones(1)])
            stored, _ = round_trip(codec, block)
            allowed = table.double() if kind is Kind.SIGNED else table[1:].double()
            nearest = allowed[(allowed - block.double()[:, None]).abs().argmin(1)]
            nearest[block == 0] = 0
            assert torch.equal(stored.double(), nearest)

    @pytest.mark.integration
    @pytest.mark.parametrize("kind", Kind)
    @pytest.mark.filterwarnings("ignore")
    def test_bit_by_bit_torchao(self, kind: Kind) -> None:
        """The map, the exact search, scales and values of the installed torchao."""
        theirs = pytest.importorskip("torchao.optim.quant_utils")
        signed = kind is Kind.SIGNED
        table = torch.tensor(theirs.create_dynamic_map(signed))
        assert torch.equal(table, dynamic_map(kind))
        for spread in (0.0, 1.0, 3.0):
            values = sample(Kind.SIGNED, 1 << 18, 1e-3)
            values = values * torch.exp(spread * sample(Kind.SIGNED, 1 << 18, 1.0).flip(0))
            values = values if signed else values.square().clamp(min=1e-30)
            scaled, scale = theirs.scale_tensor(values, 256)
            codes = theirs.quantize_8bit_with_qmap(scaled, table)
            _, buffers = round_trip(DYNAMIC[kind], values)
            kept = scale > 1e-12  # below, theirs loses values
            assert torch.equal(buffers["absmax"][kept], scale[kept])
            same = kept.repeat_interleave(256) & (torch.ones_like(codes) if signed else codes > 0).bool()
            assert torch.equal(buffers["codes"][same], codes[same])
            assert (buffers["codes"][~same] > 0).all() or signed
            ours = DYNAMIC[kind].load({"codes": codes, "absmax": scale})
            assert torch.equal(ours, theirs.dequant_with_qmap(codes, table, scale))

    @pytest.mark.integration
    @pytest.mark.parametrize("kind", Kind)
    @pytest.mark.filterwarnings("ignore")
    def test_map_of_bitsandbytes(self, kind: Kind) -> None:
        """Bit by bit that of the installed bitsandbytes."""
        theirs = pytest.importorskip("bitsandbytes.functional")
        assert torch.equal(theirs.create_dynamic_map(kind is Kind.SIGNED), dynamic_map(kind))


class TestFp8:
    """e4m3."""

    @pytest.mark.parametrize("kind", Kind)
    def test_codes_all_decode_and_encode_to_themselves(self, kind: Kind) -> None:
        """All finite ones, at many scales; e4m3 has 2 x 127 of them."""
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        finite = every[every.float().isfinite()]
        finite = finite if kind is Kind.SIGNED else finite[finite.float() >= 0]
        for exponent in range(-117, 119, 4):
            values = finite.float() * 2.0**exponent
            stored, buffers = round_trip(FP8[kind], values)
            assert torch.equal(stored, values)
            assert torch.equal(buffers["codes"].float(), finite.float())
            assert buffers["scale"].tolist() == [2.0**exponent]

    def test_stochastic_is_unbiased_in_the_value(self) -> None:
        """For every sixteen-bit random number: the mean is the value, also where the mantissa is short."""
        numbers = torch.arange(65536).float()
        for value in (300.0, 1.01, 0.3, 2.0**-6 * 1.4, 2.0**-7 * 1.3, 2.0**-9 * 1.5):
            values = torch.full((65536,), value)
            values[::256] = 448.0  # each block's scale is 1
            buffers = FP8[Kind.SECOND_MOMENT].allocate(65536, CPU)
            stored = FP8[Kind.SECOND_MOMENT].store(values, buffers, numbers)
            assert buffers["scale"].eq(1).all()
            inside = stored.view(-1, 256)[:, 1:].double()
            assert inside.mean().item() == pytest.approx(value, rel=1e-4)

    @pytest.mark.integration
    @pytest.mark.filterwarnings("ignore")
    def test_bit_by_bit_torchao(self) -> None:
        """Scales, codes and values of the installed torchao."""
        theirs = pytest.importorskip("torchao.optim.subclass_fp8")
        values = sample(Kind.SIGNED, 1 << 18, 1e-3)
        codes, scale = theirs.quantize_fp8(values, 256)
        stored, buffers = round_trip(FP8[Kind.SIGNED], values)
        assert torch.equal(buffers["scale"], scale)
        assert torch.equal(buffers["codes"].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(stored, theirs.OptimStateFp8(codes, scale).dequantize())


@pytest.mark.parametrize("name", ["int8_dynamic", "fp8", "int4"])
@pytest.mark.parametrize("scale", [1e-15, 1e-9, 1e-4, 1.0, 1e15])
def test_no_second_moment_is_lost(name: str, scale: float) -> None:
    """Whatever its size beside the block's largest, what is not zero stays so, and no larger than it may be."""
    values = sample(Kind.SECOND_MOMENT, 1 << 14, scale)
    values *= torch.exp(3 * sample(Kind.SIGNED, 1 << 14, 1.0).flip(0))
    stored, _ = round_trip(FORMATS[name][Kind.SECOND_MOMENT], values)
    assert (stored > 0).all()
    assert math.isfinite(stored.max())
    assert stored.max() <= values.max() * 1.01
