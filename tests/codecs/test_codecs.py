"""Storage formats: the reference codecs hold what their formulas promise, on finite domains for every value."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from optwatch.codecs import FORMATS, Codec, Kind, check_state, codec_for, find_codec, state_format
from optwatch.codecs.int8.codec import round_up_to_bf16
from optwatch.kernels import random
from tests.codecs.samples import CPU, round_trip, sample, uniform
from tests.kernels.agreement import bits

CODECS = sorted(
    {(codec.name, kind): codec for chosen in FORMATS.values() for kind, codec in chosen.items()}.items(),
    key=lambda item: (item[0][0], item[0][1].value),
)
SIZES = (1, 31, 127, 128, 129, 255, 256, 257, 4095, 4096, 4097)
LOG = FORMATS["int8"][Kind.SECOND_MOMENT]
CUBIC = FORMATS["int8"][Kind.SIGNED]


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize(("key", "codec"), CODECS, ids=lambda x: x[0] if isinstance(x, tuple) else "")
class TestEveryCodec:
    """What holds for any storage format."""

    def test_bytes_are_exact(self, key: tuple[str, Kind], codec: Codec, numel: int) -> None:
        """The predicted bytes are those of the storages."""
        buffers = codec.allocate(numel, CPU)
        assert codec.nbytes(numel) == sum(b.untyped_storage().nbytes() for b in buffers.values())

    def test_fresh_buffers_decode_to_zero(self, key: tuple[str, Kind], codec: Codec, numel: int) -> None:
        """State starts at zero."""
        assert not codec.load(codec.allocate(numel, CPU), numel).any()

    def test_cut_and_whole_agree(self, key: tuple[str, Kind], codec: Codec, numel: int) -> None:
        """Storing piece by piece gives the same buffers as storing at once."""
        values, numbers = sample(key[1], numel), uniform(numel)
        _, whole = round_trip(codec, values)
        pieces = codec.allocate(numel, CPU)
        for start in range(0, numel, 1024):
            stop = min(start + 1024, numel)
            codec.store(values[start:stop], codec.cut(pieces, start, stop), numbers[start:stop])
        for name, buffer in whole.items():
            assert torch.equal(bits(buffer), bits(pieces[name]))

    def test_a_value_that_is_not_finite_stays_so(
        self, key: tuple[str, Kind], codec: Codec, numel: int
    ) -> None:
        """NaN and Inf are never turned into numbers; other blocks do not suffer."""
        for bad in (math.nan, math.inf):
            values = sample(key[1], numel)
            values[numel // 2] = bad
            stored, _ = round_trip(codec, values)
            assert not stored[numel // 2].isfinite()
            first = numel // 2 // codec.block * codec.block
            assert stored[:first].isfinite().all()
            assert stored[first + codec.block :].isfinite().all()

    def test_zero_stays_zero_and_only_zero(self, key: tuple[str, Kind], codec: Codec, numel: int) -> None:
        """A second moment stored as zero would blow the update up."""
        values = sample(key[1], numel)
        values[::3] = 0.0
        stored, _ = round_trip(codec, values)
        assert not stored[::3].any()
        if key[1] is Kind.SECOND_MOMENT:
            assert (stored[values > 0] > 0).all()


def test_cubic_codes_all_decode_and_encode_to_themselves() -> None:
    """All 255 codes, at many scales."""
    codes = torch.arange(-127, 128, dtype=torch.int8)
    block = torch.cat(
        [codes[:127], codes[-1:], codes[127:]]
    )  # each half with a 127, so that it keeps its scale
    for exponent in range(-95, 127, 7):
        buffers = CUBIC.allocate(256, CPU)
        buffers["codes"].copy_(block)
        buffers["scale"].fill_(2.0**exponent)
        values = CUBIC.load(buffers)
        again = CUBIC.allocate(256, CPU)
        CUBIC.store(values, again)
        assert torch.equal(again["codes"], block)
        assert torch.equal(again["scale"], buffers["scale"])


def test_cubic_magnitudes_too_small_to_tell_apart_are_zero() -> None:
    """Below 2**-126: scale and codes are zero."""
    stored, buffers = round_trip(CUBIC, torch.full((128,), -1e-40))
    assert not stored.any()
    assert not buffers["codes"].any()
    assert not buffers["scale"].any()


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_cubic_takes_the_nearest_value(spread: float) -> None:
    """To a hundredth of the way between two of them, for the smallest code to a thirtieth."""
    values = sample(Kind.SIGNED, 1 << 16) * torch.exp(spread * sample(Kind.SIGNED, 1 << 16, 1.0).flip(0))
    stored, buffers = round_trip(CUBIC, values)
    unit = buffers["scale"].float().repeat_interleave(128).double() / 127**3
    x, code = values.double().abs() / unit, buffers["codes"].double().abs()
    upper, lower = ((code + 1) ** 3 + code**3) / 2, ((code - 1).clamp(min=0) ** 3 + code**3) / 2
    slack = torch.where(code <= 1, 0.03, 0.01)
    assert (x <= upper + slack * ((code + 1) ** 3 - code**3))[code < 127].all()
    assert (x >= lower - slack * (code**3 - (code - 1) ** 3)).all()
    assert not ((values < 0) & (stored > 0) | (values > 0) & (stored < 0)).any()


def test_rounding_up_to_bf16_for_every_upper_half() -> None:
    """For every finite bf16 value, exactly and from just below and above."""
    bits = torch.arange(0, 0x7F80, dtype=torch.int32) << 16
    exact = bits.view(torch.float32)
    assert torch.equal(round_up_to_bf16(exact), exact)
    below = (bits[1:] - 1).view(torch.float32)
    assert torch.equal(round_up_to_bf16(below), exact[1:])
    above = (bits[:-1] + 1).view(torch.float32)
    assert torch.equal(round_up_to_bf16(above), exact[1:])
    assert round_up_to_bf16((bits[-1:] + 1).view(torch.float32)).isfinite().all()


def test_a_scale_at_the_end_of_the_range_saturates() -> None:
    """Magnitudes beyond the largest finite bf16 are cut off and counted."""
    values = torch.full((128,), torch.finfo(torch.float32).max)
    for codec in (CUBIC, FORMATS["bf16"][Kind.SIGNED]):
        stored, buffers = round_trip(codec, values)
        assert stored.isfinite().all()
        assert codec.saturated(values, buffers).all()
        assert not codec.saturated(values / 4, round_trip(codec, values / 4)[1]).any()


def test_log_error_is_less_than_a_code() -> None:
    """A stored second moment is one of the two neighbours on the grid, at any magnitude."""
    for scale in (1e-18, 1e-9, 1e-4, 1.0, 1e9, 1e18):
        values = sample(Kind.SECOND_MOMENT, 1 << 14, scale).clamp(min=2.0**-126)
        stored, buffers = round_trip(LOG, values)
        step = buffers["grid"].view(-1, 2)[:, 1].repeat_interleave(256).double()
        assert ((stored.double() / values.double()).log2().abs() <= step * 1.001 + 1e-5).all()


def test_log_is_unbiased_in_the_value() -> None:
    """The mean over many random streams is the value itself."""
    values = sample(Kind.SECOND_MOMENT, 256).repeat(64)
    total = sum(round_trip(LOG, values, seed)[0].double() for seed in range(200))
    ratio = (total / 200).view(64, 256).mean(0) / values[:256].double()
    assert (ratio - 1).abs().max() < 5e-3  # 12,800 draws of a step of up to 15 %: 5 sigma


def test_log_floor() -> None:
    """Second moments below 2**-126 are kept at 2**-126, those 126 octaves below the largest at that."""
    stored, _ = round_trip(LOG, torch.tensor([1e-45, 1e-40, 2.0**-126, 0.0]))
    assert stored.tolist()[3] == 0.0
    torch.testing.assert_close(stored[:3], torch.full((3,), 2.0**-126))
    stored, _ = round_trip(LOG, torch.tensor([2.0**-120, 2.0**100]))
    torch.testing.assert_close(stored, torch.tensor([2.0**-26, 2.0**100]), rtol=1e-4, atol=0)


def test_stochastic_bf16_for_every_value() -> None:
    """Every finite bf16 stays itself; between two, the share of ups is the distance, for every random number."""
    exact = (torch.arange(0, 0x7F80, dtype=torch.int32) << 16).view(torch.float32)
    codec = FORMATS["bf16"][Kind.SECOND_MOMENT]
    stored, _ = round_trip(codec, exact)
    assert torch.equal(stored, exact)
    between = torch.full((65536,), (0x3F800000 + 12345), dtype=torch.int32).view(torch.float32)
    buffers = codec.allocate(65536, CPU)
    stored = codec.store(between, buffers, torch.arange(65536).float())
    assert (stored > 1).sum().item() == 12345


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_largest_number_stays_finite(name: str) -> None:
    """The last bits of a logarithmic grid must not carry it beyond the range of fp32."""
    for lowest in (1e-30, 1.0, 23.0, 1e30):
        for largest in (3.402820424023848e38, torch.finfo(torch.float32).max):
            stored, _ = round_trip(FORMATS[name][Kind.SECOND_MOMENT], torch.tensor([lowest, largest]))
            assert stored.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=600),
    st.sampled_from(CODECS),
)
def test_any_finite_values_stay_finite(values: list[float], entry: tuple[tuple[str, Kind], Codec]) -> None:
    """Whatever is stored, what comes back is finite, of the same sign, and no larger than the block's largest."""
    (_, kind), codec = entry
    x = torch.tensor(values, dtype=torch.float32)
    x = x.abs() if kind is Kind.SECOND_MOMENT else x
    stored, _ = round_trip(codec, x)
    assert stored.isfinite().all()
    assert (stored * x.sign() >= 0).all()
    assert stored.abs().max() <= max(x.abs().max().item() * 1.016, 2.0**-126)


def test_formats_are_told_apart_by_their_tensors() -> None:
    """Every codec is found again from its primary dtype and the names of its other buffers."""
    for (_, kind), codec in CODECS:
        others = [buffer.name for buffer in codec.buffers[1:]]
        assert find_codec(kind, codec.buffers[0].dtype, others) is codec
    assert find_codec(Kind.SIGNED, torch.float64, ()) is None


def test_small_tensors_keep_exact_state() -> None:
    """Below 4096 elements low-bit formats mean fp32."""
    for name in ("int8", "int8_dynamic", "fp8", "int4"):
        for kind in Kind:
            assert codec_for(name, "exp_avg", kind, 4095).name == "fp32"
            assert codec_for(name, "exp_avg", kind, 4096) is FORMATS[name][kind]
    assert codec_for("bf16", "exp_avg", Kind.SIGNED, 1).name == "bf16"


def test_a_format_for_each_slot() -> None:
    """By the slot's name, the others by default."""
    state = {"exp_avg": "int8", "default": "bf16"}
    assert codec_for(state, "exp_avg", Kind.SIGNED, 4096).name == "int8_cubic"
    assert codec_for(state, "exp_avg", Kind.SIGNED, 4095).name == "fp32"
    assert codec_for(state, "exp_avg_sq", Kind.SECOND_MOMENT, 1).name == "bf16_stochastic"
    check_state(state, ["exp_avg", "exp_avg_sq"])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"exp_avg": "int8"}, "state= has no format for 'exp_avg_sq': name one, or one for 'default'"),
        (
            {"momentum": "int8", "default": "fp32"},
            "names a slot 'momentum' that this optimizer does not keep: use 'exp_avg', 'exp_avg_sq', 'default'",
        ),
        ({"default": "int9"}, "unknown state format 'int9'"),
        ({"default": None}, "unknown state format None"),
        ("int9", "unknown state format 'int9'"),
    ],
)
def test_a_wrong_choice_is_refused(state: object, message: str) -> None:
    """With the names that are valid."""
    with pytest.raises(ValueError, match=message):
        check_state(state, ["exp_avg", "exp_avg_sq"])  # type: ignore[arg-type]


def test_unknown_format_names_the_valid_ones() -> None:
    """The message is the documentation."""
    with pytest.raises(ValueError, match="unknown state format 'int9': use one of 'fp32', 'bf16', 'int8'"):
        state_format("int9")
    with pytest.raises(ValueError, match="unknown state format"):
        state_format(None)  # type: ignore[arg-type]


class TestRandomNumbers:
    """The generator behind stochastic rounding."""

    @staticmethod
    def key(seed: int = 0, parameter: int = 0, step: int = 1, slot: int = 1, first: int = 0) -> list[int]:
        keys = random.keys(
            np.array([seed], np.uint64),
            np.array([parameter], np.uint64),
            2,
            np.array([step], np.float64),
            np.array([first], np.uint64),
        )
        return keys[0, slot].tolist()

    def test_uniform_and_independent(self) -> None:
        """Moments, serial correlation, and correlation between neighbouring keys are those of white noise."""
        n = 1 << 20
        base = random.numbers(self.key(), 0, n, CPU).double()
        assert abs(base.mean() - 32767.5) < 5 * 18918 / math.sqrt(n)
        assert abs(base.std() - 18918) < 100
        counts = torch.bincount(base.long() >> 8, minlength=256).double()
        chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
        assert 255 - 5 * math.sqrt(510) < chi2 < 255 + 5 * math.sqrt(510)
        white = (base - base.mean()) / base.std()
        for lag in (1, 2, 3, 128, 256):
            assert abs((white[lag:] * white[:-lag]).mean()) < 5 / math.sqrt(n)
        for other in (self.key(seed=1), self.key(parameter=1), self.key(step=2), self.key(slot=0)):
            noise = random.numbers(other, 0, n, CPU).double()
            assert abs((white * (noise - noise.mean()) / noise.std()).mean()) < 5 / math.sqrt(n)

    def test_steps_of_one_element_are_independent(self) -> None:
        """A second moment sees the numbers of one element over thousands of steps."""
        steps = 4096
        series = torch.stack(
            [random.numbers(self.key(step=s), 1000, 1064, CPU) for s in range(1, steps + 1)]
        ).double()
        series = (series - series.mean(0)) / series.std(0)
        assert (series[1:] * series[:-1]).mean(0).abs().max() < 5 / math.sqrt(steps)

    def test_a_piece_is_a_piece_of_the_whole(self) -> None:
        """Numbers depend on the element's index only, also beyond 2**32 pairs."""
        whole = random.numbers(self.key(), 0, 1001, CPU)
        assert torch.equal(random.numbers(self.key(), 500, 777, CPU), whole[500:777])
        far = random.numbers(self.key(), 2**33 - 4, 2**33 + 4, CPU)
        assert torch.equal(far[4:], random.numbers(self.key(), 2**33, 2**33 + 4, CPU))
        assert not torch.equal(far[4:], whole[:4])

    @pytest.mark.parametrize("first", [2, 4096, 2**31 - 2, 2**33 - 100, 2**33, 3 * 2**34 + 6])
    def test_a_key_can_begin_anywhere(self, first: int) -> None:
        """The key of a piece gives its elements the numbers that they have in the whole."""
        whole = random.numbers(self.key(), first, first + 99, CPU)
        assert torch.equal(random.numbers(self.key(first=first), 0, 99, CPU), whole)
