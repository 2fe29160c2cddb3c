"""Series on which alerts wait, fire or keep quiet: the rows that test_alerts.py tries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Series: one value a minute from minute 0 on, in promtool's notation: "1x9" is ten ones, "_x10" ten minutes without a
# sample, "stale" ends a series.
R = 'run_id="r", rank="0"'
R1 = 'run_id="r", rank="1"'
A = f'{R}, optimizer="AdamW"'
STATE_METRIC = "optwatch_run_state"
RUNNING_STATE = f'{STATE_METRIC}{{{R}, state="running"}}'
RUNNING = {RUNNING_STATE: "1x200"}
FINISHED = {
    f'optwatch_run_state{{{R}, state="running"}}': "0x200",
    f'optwatch_run_state{{{R}, state="finished"}}': "1x200",
}
FOUND = f'optwatch_optimizer_state_bytes{{{A}, slot="exp_avg", dtype="int8", device="cpu"}}'
PROMOTED = f'optwatch_optimizer_state_bytes{{{A}, slot="exp_avg", dtype="float32", device="cpu"}}'
ASKED = f'optwatch_optimizer_state_expected_bytes{{{A}, slot="exp_avg", dtype="int8", device="cpu"}}'
PARAMETERS = f'optwatch_parameters{{{A}, dtype="float32", device="cpu"}}'
NONFINITE = f"optwatch_nonfinite_elements_total{{{A}}}"
ERROR = f'optwatch_update_quantization_error_ratio{{{A}, group="layers 0-3"}}'
UPDATE = f'optwatch_update_norm{{{A}, group="layers 0-3"}}'
UNCHANGED = f'optwatch_weights_unchanged_ratio{{{A}, group="layers 0-3"}}'
STEP_TIME = f"optwatch_last_step_timestamp_seconds{{{R}}}"
SAMPLE_TIME = f"optwatch_last_sample_timestamp_seconds{{{R}}}"
UP = f"optwatch_rank_up{{{R}}}"
DROPPED = f"optwatch_samples_dropped_total{{{R}}}"
NORM = f'optwatch_gradient_norm{{{A}, group="layers 0-3"}}'
RATIO = f'optwatch_update_to_parameter_ratio{{{A}, group="layers 0-3"}}'
ZEROS = f'optwatch_quantization_underflow_ratio{{{A}, slot="exp_avg_sq", group="layers 0-3"}}'
CLIPPED = f'optwatch_quantization_saturated_ratio{{{A}, slot="exp_avg", group="layers 0-3"}}'
STEPS, SKIPPED = f"optwatch_steps_total{{{A}}}", f"optwatch_steps_skipped_total{{{A}}}"
RSS = f"optwatch_host_memory_rss_bytes{{{R}}}"
ALLOCATED = f'optwatch_allocator_allocated_bytes{{{R}, gpu="GPU-1"}}'
RETRIES = f'optwatch_allocator_retries_total{{{R}, gpu="GPU-1"}}'
ECC = 'optwatch_device_ecc_errors_total{{instance="a", gpu="GPU-1", error="{0}"}}'
FAILURES = 'optwatch_otlp_failures_total{instance="a", reason="refused"}'
AGENT = 'up{job="optwatch", instance="a"}'
AGENT_RUNNING = f'optwatch_run_state{{job="optwatch", instance="a", {R}, state="running"}}'


@dataclass(frozen=True)
class Case:
    """What an alert does on given series: number of alerts firing and pending by minute."""

    alert: str
    what: str
    series: Mapping[str, str]
    firing: Mapping[int, int] = field(default_factory=dict)
    pending: Mapping[int, int] = field(default_factory=dict)


def _job(run: str, start: str) -> dict[str, str]:
    facts = 'world_size="1", local_rank="0", host="h", pid="1", replicas="1"'
    labels = f'run_id="{run}", rank="0"'
    state = f'{labels}, optimizer="AdamW", slot="exp_avg", dtype="int8", device="cpu"'
    return {
        f'optwatch_run_info{{{labels}, job_id="7", {facts}}}': start.format(1),
        f"optwatch_optimizer_state_bytes{{{state}}}": start.format(200 if run == "a" else 800),
        f'optwatch_parameters{{{labels}, optimizer="AdamW", dtype="float32", device="cpu"}}': start.format(
            100
        ),
    }


def _gpu(free: int, reserved: int, peak: int) -> dict[str, str]:
    """A GPU of 100 bytes."""
    values = {
        'optwatch_device_memory_total_bytes{gpu="GPU-1"}': 100,
        'optwatch_device_memory_free_bytes{gpu="GPU-1"}': free,
        f'optwatch_allocator_reserved_bytes{{{R}, gpu="GPU-1"}}': reserved,
        f'optwatch_allocator_allocated_peak_bytes{{{R}, gpu="GPU-1"}}': peak,
    }
    return {name: f"{value}x60" for name, value in values.items()}


def _ranks(*seconds: float, metric: str = "step_duration", labels: str = "") -> dict[str, str]:
    """Ranks that take a step a second, of which so many seconds count."""
    series = {}
    for rank, each in enumerate(seconds):
        name = f'run_id="r", rank="{rank}"{labels}'
        series[f"optwatch_{metric}_seconds_sum{{{name}}}"] = f"0+{60 * each:g}x60"
        series[f"optwatch_{metric}_seconds_count{{{name}}}"] = "0+60x60"
        series[f'optwatch_run_state{{{name.removesuffix(labels)}, state="running"}}'] = "1x60"
    return series


CASES = (
    Case(
        "StateBytesUnexpected", "a resume promotes int8 to fp32",
        {FOUND: "100x9 stale", PROMOTED: "_x10 400x50", ASKED: "100x60", **RUNNING},
        firing={9: 0, 10: 0, 11: 1, 40: 1}, pending={9: 0, 10: 1, 11: 0},
    ),
    Case(
        "StateBytesUnexpected", "one byte too many is too many",
        {FOUND: "1000000x9 1000001x50", ASKED: "1000000x60", **RUNNING}, firing={11: 1},
    ),
    Case(
        "StateBytesUnexpected", "state is lost",
        {FOUND: "100x9 0x50", ASKED: "100x60", **RUNNING}, firing={11: 1},
    ),
    Case(
        "StateBytesUnexpected", "found and asked for grow together",
        {FOUND: "0x9 400x50", ASKED: "0x9 400x50", **RUNNING}, firing={11: 0, 40: 0}, pending={10: 0},
    ),
    Case(
        "StateBytesUnexpected", "a difference of one scrape only",
        {FOUND: "100x9 400 100x50", ASKED: "100x60", **RUNNING}, firing={11: 0, 12: 0}, pending={10: 1, 11: 0},
    ),
    Case(
        "StateBytesUnexpected", "nothing is known about what was asked for",
        {FOUND: "400x60", **RUNNING}, firing={30: 0},
    ),
    Case(
        "StateBytesUnexpected", "a finished run",
        {FOUND: "400x60", ASKED: "100x60", **FINISHED}, firing={30: 0},
    ),
    Case(
        "StateBytesUnexpected", "only the rank that differs",
        {
            FOUND: "400x60", ASKED: "100x60", **RUNNING,
            FOUND.replace(R, R1): "100x60", ASKED.replace(R, R1): "100x60",
            f'optwatch_run_state{{{R1}, state="running"}}': "1x60",
        },
        firing={30: 1},
    ),
    Case(
        "StateBytesRegression", "grows within a run, without a known expectation",
        {FOUND: "200x9 800x50", PARAMETERS: "100x60", **RUNNING},
        firing={11: 0, 12: 1}, pending={9: 0, 10: 1, 11: 1},
    ),
    Case(
        "StateBytesRegression", "less than five percent",
        {FOUND: "200x9 209x50", PARAMETERS: "100x60", **RUNNING}, firing={30: 0}, pending={11: 0},
    ),
    Case(
        "StateBytesRegression", "layers are unfrozen: the growth was asked for",
        {FOUND: "200x9 800x50", ASKED: "200x9 800x50", PARAMETERS: "100x60", **RUNNING}, firing={30: 0},
    ),
    Case(
        "StateBytesRegression", "the first steps make the state",
        {FOUND: "0x9 800x50", PARAMETERS: "100x60", **RUNNING}, firing={12: 0, 30: 0},
    ),
    Case(
        "StateBytesRegression", "the same job comes back as another run with larger state",
        {**_job("a", "{0}x9 stale"), **_job("b", "_x20 {0}x60")}, firing={19: 0, 22: 1},
    ),
    Case(
        "QuantizationErrorHigh", "rises",
        {ERROR: "0.1x4 0.3x50", **RUNNING}, firing={14: 0, 15: 1}, pending={5: 1, 14: 1},
    ),
    Case(
        "QuantizationErrorHigh", "at the threshold",
        {ERROR: "0.25x60", **RUNNING}, firing={30: 0}, pending={30: 0},
    ),
    Case("QuantizationErrorHigh", "NaN is the other alert's", {ERROR: "NaNx60", **RUNNING}, firing={30: 0}),
    Case("QuantizationErrorHigh", "a finished run", {ERROR: "0.3x60", **FINISHED}, firing={30: 0}),
    Case(
        "QuantizationErrorSpike", "after a quiet hour",
        {ERROR: "0.02x60 0.15x90", **RUNNING}, firing={61: 0, 62: 1, 140: 0}, pending={60: 0, 61: 1},
    ),
    Case("QuantizationErrorSpike", "high from the beginning", {ERROR: "0.15x90", **RUNNING}, firing={60: 0}),
    Case(
        "QuantizationErrorSpike", "large only beside nothing",
        {ERROR: "0.001x60 0.05x60", **RUNNING}, firing={70: 0},
    ),
    Case("QuantizationErrorSpike", "NaN", {ERROR: "0.02x60 " + "NaN " * 30, **RUNNING}, firing={70: 0}),
    Case(
        "SecondMomentUnderflow", "zeros",
        {ZEROS: "0x4 0.01x50", **RUNNING}, firing={14: 0, 15: 1}, pending={5: 1},
    ),
    Case("SecondMomentUnderflow", "none", {ZEROS: "0x60", **RUNNING}, firing={30: 0}),
    Case("SecondMomentUnderflow", "NaN", {ZEROS: "NaNx60", **RUNNING}, firing={30: 0}),
    Case(
        "SecondMomentUnderflow", "of a first moment, where it is harmless",
        {ZEROS.replace("exp_avg_sq", "exp_avg"): "0.1x60", **RUNNING}, firing={30: 0},
    ),
    Case(
        "CodecSaturated", "clipped",
        {CLIPPED: "0x4 0.05x50", **RUNNING}, firing={14: 0, 15: 1}, pending={5: 1},
    ),
    Case("CodecSaturated", "at the threshold", {CLIPPED: "0.01x60", **RUNNING}, firing={30: 0}),
    Case("CodecSaturated", "a finished run", {CLIPPED: "0.05x60", **FINISHED}, firing={30: 0}),
    Case(
        "SkippedStepsHigh", "a loss scale that finds no value",
        {STEPS: "0+60x90", SKIPPED: "0x19 300x60", **RUNNING}, firing={24: 0, 25: 1, 40: 0}, pending={19: 0, 20: 1},
    ),
    Case(
        "SkippedStepsHigh", "one in a hundred",
        {STEPS: "0+100x60", SKIPPED: "0+1x60", **RUNNING}, firing={30: 0},
    ),
    Case(
        "SkippedStepsHigh", "the counters start again",
        {STEPS: "0+60x30 0+60x30", SKIPPED: "300x30 0x30", **RUNNING}, firing={36: 0, 50: 0},
    ),
    Case(
        "GradientNormSpike", "twenty times the usual",
        {NORM: "1x60 20x60", **RUNNING}, firing={61: 0, 62: 1, 115: 0}, pending={60: 0, 61: 1},
    ),
    Case("GradientNormSpike", "a single sample", {NORM: "1x60 20 1x60", **RUNNING}, firing={62: 1, 67: 0}),
    Case("GradientNormSpike", "nine times the usual", {NORM: "1x60 9x60", **RUNNING}, firing={65: 0}),
    Case("GradientNormSpike", "in the first half hour", {NORM: "1x9 20x15", **RUNNING}, firing={20: 0}),
    Case("GradientNormSpike", "from zero", {NORM: "0x60 1x60", **RUNNING}, firing={65: 0}),
    Case(
        "GradientNormSpike", "NaN is the other alert's",
        {NORM: "1x60 " + "NaN " * 30, **RUNNING}, firing={70: 0},
    ),
    Case(
        "UpdateRatioTooHigh", "a wild rate",
        {RATIO: "0.01x4 0.2x50", **RUNNING}, firing={9: 0, 10: 1}, pending={5: 1},
    ),
    Case("UpdateRatioTooHigh", "at the threshold", {RATIO: "0.1x60", **RUNNING}, firing={30: 0}),
    Case("UpdateRatioTooHigh", "a finished run", {RATIO: "0.2x60", **FINISHED}, firing={30: 0}),
    Case(
        "UpdateRatioTooLow", "a rate too small",
        {RATIO: "5e-7x60", **RUNNING}, firing={29: 0, 30: 1}, pending={0: 1, 29: 1},
    ),
    Case("UpdateRatioTooLow", "small", {RATIO: "1e-5x60", **RUNNING}, firing={45: 0}),
    Case("UpdateRatioTooLow", "a rate of zero is meant", {RATIO: "0x60", **RUNNING}, firing={45: 0}),
    Case("UpdateRatioTooLow", "NaN", {RATIO: "NaNx60", **RUNNING}, firing={45: 0}),
    Case(
        "MemoryHeadroomLow", "full at its peak",
        {**_gpu(1, 80, 78), **RUNNING}, firing={4: 0, 5: 1}, pending={0: 1, 4: 1},
    ),
    Case("MemoryHeadroomLow", "only torch's cache is full", {**_gpu(1, 95, 50), **RUNNING}, firing={30: 0}),
    Case("MemoryHeadroomLow", "a finished run", {**_gpu(1, 80, 78), **FINISHED}, firing={30: 0}),
    Case(
        "MemoryHeadroomLow", "the agent is gone",
        dict.fromkeys(_gpu(1, 80, 78), "1x9 stale"), firing={30: 0},
    ),
    Case(
        "MemoryLeak", "on the host",
        {RSS: "1000+50x90", **RUNNING}, firing={29: 0, 30: 1, 60: 1}, pending={15: 1, 29: 1},
    ),
    Case("MemoryLeak", "on the GPU", {ALLOCATED: "1000+50x90", **RUNNING}, firing={30: 1}),
    Case("MemoryLeak", "grows once", {RSS: "1000x30 2000x60", **RUNNING}, firing={45: 0, 60: 0}),
    Case(
        "MemoryLeak", "fills a cache for ten minutes",
        {RSS: "1000x19 1000+100x10 2000x60", **RUNNING}, firing={50: 0},
    ),
    Case(
        "MemoryLeak", "the process starts again",
        {RSS: "1000+50x10 500x60", **RUNNING}, firing={30: 0, 45: 0},
    ),
    Case("MemoryLeak", "a finished run", {RSS: "1000+50x90", **FINISHED}, firing={45: 0}),
    Case(
        "AllocatorRetries", "ten at once",
        {RETRIES: "0x9 10x50", **RUNNING}, firing={10: 0, 11: 1, 27: 0}, pending={10: 1},
    ),
    Case("AllocatorRetries", "one", {RETRIES: "0x9 1x50", **RUNNING}, firing={11: 0}),
    Case("AllocatorRetries", "the counter starts again", {RETRIES: "10x9 0x50", **RUNNING}, firing={11: 0}),
    Case(
        "EccErrors", "one",
        {ECC.format("uncorrected"): "0x9 1x90"}, firing={10: 0, 11: 1, 75: 0}, pending={10: 1},
    ),
    Case("EccErrors", "corrected ones", {ECC.format("corrected"): "0+10x60"}, firing={30: 0}),
    Case(
        "EccErrors", "the driver is loaded again",
        {ECC.format("uncorrected"): "5x9 0x60"}, firing={11: 0, 30: 0},
    ),
    Case("EccErrors", "the agent is gone", {ECC.format("uncorrected"): "5x9 stale"}, firing={11: 0, 30: 0}),
    Case("StragglerRank", "one of four", _ranks(1, 1, 1, 1.5), firing={10: 0, 11: 1}, pending={1: 1, 10: 1}),
    Case(
        "StragglerRank", "its optimizer only",
        _ranks(0.1, 0.1, 0.3, metric="optimizer_step_duration", labels=', optimizer="AdamW"'), firing={11: 1},
    ),
    Case("StragglerRank", "all alike", _ranks(1, 1.1, 0.9, 1), firing={30: 0}),
    Case("StragglerRank", "alone", _ranks(1), firing={30: 0}),
    Case("StragglerRank", "a rank takes no steps", _ranks(1, 1, 1, 0), firing={30: 0}),
    Case("NonFiniteUpdates", "NaN", {UPDATE: "1x9 NaNx50"}, firing={10: 0, 11: 1}, pending={9: 0, 10: 1}),
    Case("NonFiniteUpdates", "Inf", {UPDATE: "1x9 Infx50"}, firing={11: 1}),
    Case(
        "NonFiniteUpdates", "one rank of two",
        {UPDATE: "NaNx50", UPDATE.replace(R, R1): "1x50"}, firing={11: 1},
    ),
    Case("NonFiniteUpdates", "finite, large and zero", {UPDATE: "1e300x9 0x50"}, firing={5: 0, 20: 0}),
    Case("NonFiniteUpdates", "a finished run", {UPDATE: "NaNx60", **FINISHED}, firing={30: 0}),
    Case(
        "NonFiniteGradients", "a burst",
        {NONFINITE: "0x9 5x50", **RUNNING}, firing={10: 0, 11: 1, 20: 0}, pending={9: 0, 10: 1, 20: 0},
    ),
    Case(
        "NonFiniteGradients", "there when first seen",
        {NONFINITE: "_x10 5x50", **RUNNING}, firing={11: 1, 20: 0},
    ),
    Case(
        "NonFiniteGradients", "the counter starts again",
        {NONFINITE: "5x9 0x50", **RUNNING}, firing={11: 0, 30: 0},
    ),
    Case("NonFiniteGradients", "a finished run", {NONFINITE: "0x9 5x50", **FINISHED}, firing={11: 0}),
    Case(
        "WeightsNotMoving", "bf16 weights",
        {UNCHANGED: "0.995x60", **RUNNING}, firing={14: 0, 15: 1}, pending={0: 1, 14: 1},
    ),
    Case("WeightsNotMoving", "most of them move", {UNCHANGED: "0.9x60", **RUNNING}, firing={30: 0}),
    Case("WeightsNotMoving", "not measured", {UNCHANGED: "NaNx60", **RUNNING}, firing={30: 0}),
    Case("WeightsNotMoving", "a finished run", {UNCHANGED: "1x60", **FINISHED}, firing={30: 0}),
    Case(
        "TrainingStalled", "no step for ten minutes",
        {STEP_TIME: "0+60x9 540x50", **RUNNING}, firing={20: 0, 21: 1}, pending={19: 0, 20: 1},
    ),
    Case("TrainingStalled", "a step a minute", {STEP_TIME: "0+60x60", **RUNNING}, firing={30: 0}),
    Case("TrainingStalled", "a finished run", {STEP_TIME: "0x60", **FINISHED}, firing={30: 0}),
    Case(
        "RankMissing", "killed",
        {UP: "1x9 0x4 stale", **RUNNING}, firing={11: 0, 12: 1, 30: 1}, pending={10: 1},
    ),
    Case("RankMissing", "the node vanishes", {UP: "1x9 stale"}, firing={11: 0, 12: 1, 30: 1, 80: 0}),
    Case("RankMissing", "finished", {UP: "1x9 0x4 stale", **FINISHED}, firing={12: 0, 30: 0}),
    Case(
        "RankMissing", "finished, and its series ended",
        {
            UP: "1x9 0x4 stale",
            f'optwatch_run_state{{{R}, state="finished"}}': "0x9 1x4 stale",
        },
        firing={12: 0, 30: 0},
    ),
    Case(
        "RankMissing", "another agent takes over",
        {f'optwatch_rank_up{{instance="a", {R}}}': "1x9 stale", f'optwatch_rank_up{{instance="b", {R}}}': "_x11 1x50"},
        firing={12: 0, 30: 0},
    ),
    Case(
        "TelemetryStale", "steps without full statistics",
        {STEP_TIME: "0+60x90", SAMPLE_TIME: "0+60x9 540x90", **RUNNING},
        firing={44: 0, 45: 1}, pending={39: 0, 40: 1},
    ),
    Case(
        "TelemetryStale", "both stand still",
        {STEP_TIME: "540x90", SAMPLE_TIME: "540x90", **RUNNING}, firing={80: 0},
    ),
    Case("TelemetryStale", "statistics are off", {STEP_TIME: "0+60x90", **RUNNING}, firing={80: 0}),
    Case("SamplesDropped", "one a second", {DROPPED: "0+60x60"}, firing={11: 0, 12: 1}, pending={2: 1, 11: 1}),
    Case("SamplesDropped", "one a minute", {DROPPED: "0+1x60"}, firing={30: 0}),
    Case("SamplesDropped", "the agent starts again", {DROPPED: "90000x9 0x50"}, firing={15: 0, 25: 0}),
    Case(
        "ExportFailing", "a dead collector",
        {FAILURES: "0x4 5+10x50"}, firing={14: 0, 15: 1}, pending={5: 1, 14: 1},
    ),
    Case("ExportFailing", "a burst", {FAILURES: "0x4 5x50"}, firing={15: 0, 30: 0}),
    Case("ExportFailing", "the agent starts again", {FAILURES: "9x9 0x50"}, firing={15: 0, 25: 0}),
    Case(
        "DeviceLost", "lost",
        {'optwatch_device_up{gpu="GPU-1"}': "1x9 0x50"}, firing={10: 0, 11: 1}, pending={10: 1},
    ),
    Case("DeviceLost", "no GPU", {UP: "1x60"}, firing={30: 0}),
    Case(
        "AgentDown", "while a rank was running",
        {AGENT: "1x9 0x90", AGENT_RUNNING: "1x9 stale"}, firing={14: 0, 15: 1}, pending={9: 0, 10: 1},
    ),
    Case(
        "AgentDown", "left after its last run",
        {AGENT: "1x9 0x90", AGENT_RUNNING: "1x4 0x4 stale"}, firing={15: 0},
    ),
    Case(
        "AgentDown", "the target of another job",
        {AGENT.replace("optwatch", "node"): "0x90", AGENT_RUNNING: "1x9"}, firing={15: 0},
    ),
)  # fmt: skip
