"""The catalogue: names, units and labels of every metric, and what registration refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from optwatch.metrics.catalogue import CATALOGUE
from optwatch.metrics.docs import DEFAULT_PATH, generate
from optwatch.metrics.fields import CHEAP_FIELDS, FAMILIES
from optwatch.metrics.formulas import Mean, Norm
from optwatch.metrics.spec import LABELS, Catalogue, MetricSpec, prometheus_name

ROOT = Path(__file__).parents[2]
SPECS = list(CATALOGUE.values())
GAUGE = MetricSpec("optwatch.thing", "gauge", "", "A thing", ("run_id", "rank"))

#: The names that dashboards, rules and people rely on: changing one breaks what they have stored.
NAMES = [
    "optwatch_run_info",
    "optwatch_run_state",
    "optwatch_rank_up",
    "optwatch_step",
    "optwatch_loss",
    "optwatch_scalar",
    "optwatch_training_tokens_total",
    "optwatch_training_samples_total",
    "optwatch_events_total",
    "optwatch_last_event_timestamp_seconds",
    "optwatch_last_step_timestamp_seconds",
    "optwatch_last_sample_timestamp_seconds",
    "optwatch_step_duration_seconds",
    "optwatch_optimizer_info",
    "optwatch_optimizer_step_duration_seconds",
    "optwatch_steps_total",
    "optwatch_steps_skipped_total",
    "optwatch_replicas",
    "optwatch_learning_rate",
    "optwatch_optimizer_state_bytes",
    "optwatch_optimizer_state_expected_bytes",
    "optwatch_parameter_bytes",
    "optwatch_gradient_bytes",
    "optwatch_parameters",
    "optwatch_host_memory_rss_bytes",
    "optwatch_host_memory_peak_bytes",
    "optwatch_gradient_norm",
    "optwatch_gradient_norm_before_clipping",
    "optwatch_gradient_clip_ratio",
    "optwatch_nonfinite_elements_total",
    "optwatch_parameter_norm",
    "optwatch_update_norm",
    "optwatch_update_to_parameter_ratio",
    "optwatch_moment_gradient_cosine",
    "optwatch_weights_unchanged_ratio",
    "optwatch_update_quantization_error_ratio",
    "optwatch_quantization_error_ratio",
    "optwatch_quantization_underflow_ratio",
    "optwatch_quantization_saturated_ratio",
    "optwatch_moment_norm",
    "optwatch_moment_mean",
    "optwatch_moment_rms",
    "optwatch_moment_absmax",
    "optwatch_estimated_update_quantization_error_ratio",
    "optwatch_estimated_quantization_error_ratio",
    "optwatch_shadow_update_error_ratio",
    "optwatch_shadow_moment_error_ratio",
    "optwatch_device_info",
    "optwatch_device_up",
    "optwatch_device_memory_used_bytes",
    "optwatch_device_memory_free_bytes",
    "optwatch_device_memory_reserved_bytes",
    "optwatch_device_memory_total_bytes",
    "optwatch_device_utilization_ratio",
    "optwatch_device_power_watts",
    "optwatch_device_energy_joules_total",
    "optwatch_device_temperature_celsius",
    "optwatch_device_ecc_errors_total",
    "optwatch_device_xid_errors_total",
    "optwatch_device_xid_info",
    "optwatch_process_device_memory_bytes",
    "optwatch_device_clock_throttled",
    "optwatch_allocator_allocated_bytes",
    "optwatch_allocator_reserved_bytes",
    "optwatch_allocator_active_bytes",
    "optwatch_allocator_inactive_split_bytes",
    "optwatch_allocator_allocated_peak_bytes",
    "optwatch_allocator_reserved_peak_bytes",
    "optwatch_allocator_retries_total",
    "optwatch_pinned_memory_bytes",
    "optwatch_allocator_ooms_total",
    "optwatch_build_info",
    "optwatch_overhead_seconds_total",
    "optwatch_adapter_errors_total",
    "optwatch_samples_dropped_total",
    "optwatch_series_dropped_total",
    "optwatch_boards_skipped_total",
    "optwatch_nvml_errors_total",
    "optwatch_otlp_exports_total",
    "optwatch_otlp_failures_total",
    "optwatch_store_failures_total",
    "optwatch_scrape_duration_seconds",
]


def test_prometheus_names() -> None:
    """The names are the ones published before."""
    assert [spec.prometheus for spec in SPECS] == NAMES


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_name_follows_the_rules_of_prometheus(spec: MetricSpec) -> None:
    """Base units as suffix, `_total` for counters and for nothing else, `_ratio` for ratios."""
    name = spec.prometheus
    assert re.fullmatch(r"optwatch_[a-z0-9_]+", name)
    assert name.endswith("_total") == (spec.instrument == "counter")
    assert name.endswith("_info") == (spec.instrument == "info")
    assert ("_ratio" in name) == (spec.unit == "1")
    for unit, suffix in {
        "By": "_bytes",
        "s": "_seconds",
        "J": "_joules",
        "W": "_watts",
        "Cel": "_celsius",
    }.items():
        assert (spec.unit == unit) == name.removesuffix("_total").endswith(suffix)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_labels_are_bounded_and_name_the_run(spec: MetricSpec) -> None:
    """Every label says what bounds it; facts that would multiply series are on info metrics only."""
    assert set(spec.labels) <= set(LABELS)
    if "optimizer" in spec.labels or "rank" in spec.labels:
        assert spec.labels[:2] == ("run_id", "rank")
    if spec.instrument != "info":
        assert not {"host", "job_id", "pid", "codec", "replicas", "model"} & set(spec.labels)


def test_every_label_is_used() -> None:
    """The table of labels holds no leftovers."""
    assert {label for spec in SPECS for label in spec.labels} == set(LABELS)


def test_cheap_metrics_need_no_full_statistics() -> None:
    """What is formed from the cheap sums is there at every step, all else only where a step took the full set."""
    cheap = {spec.name for spec in SPECS if spec.formula and not spec.needs_full}
    assert cheap == {"optwatch.gradient.norm", "optwatch.update.norm"}
    for spec in SPECS:
        if spec.name in cheap:
            assert spec.formula is not None
            assert set(spec.formula.fields) <= {*CHEAP_FIELDS, "numel"}


def test_levels() -> None:
    """Formulas are taken once a tensor or once a slot, as the label says; other metrics have no level."""
    assert {spec.name for spec in CATALOGUE.formed("slot")} >= {"optwatch.moment.norm"}
    assert {spec.name for spec in CATALOGUE.formed("tensor")} >= {"optwatch.gradient.norm"}
    formed = sum(len(CATALOGUE.formed(level, family)) for level in ("slot", "tensor") for family in FAMILIES)
    assert formed == sum(spec.formula is not None for spec in SPECS)
    assert CATALOGUE["optwatch.rank_up"].level is None


def test_series_of_a_rank_stay_within_the_default_cap() -> None:
    """One optimizer with two slots on one GPU, six groups and two dtypes stays below 300 series a rank."""
    sizes = {"group": 6, "slot": 2, "dtype": 2, "param_group": 2, "state": 4}
    count = 0
    for spec in SPECS:
        if "rank" not in spec.labels:
            continue
        series = len(spec.buckets) + 3 if spec.buckets else 1
        for label in spec.labels:
            series *= sizes.get(label, 1)
        count += series
    assert count <= 300


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"name": "thing"}, "starts with 'optwatch.'"),
        ({"name": "optwatch.Thing"}, "lower case"),
        ({"unit": "ms"}, "unit 'ms' is not one of"),
        ({"unit": "1"}, "go together"),
        ({"name": "optwatch.thing.ratio"}, "go together"),
        ({"brief": ""}, "needs a brief"),
        ({"brief": "A thing."}, "without the full stop"),
        ({"instrument": "counter", "name": "optwatch.thing.total"}, "take it out of the name"),
        ({"labels": ("colour",)}, "not in LABELS"),
        ({"labels": ("job",)}, "meaning of its own"),
        ({"labels": ("rank",)}, "also carries run_id"),
        ({"labels": ("run_id", "run_id")}, "listed twice"),
        ({"instrument": "histogram"}, "lists its buckets"),
        ({"buckets": (1.0,)}, "lists its buckets"),
        ({"instrument": "histogram", "buckets": (2.0, 1.0)}, "must rise"),
        ({"formula": Norm("sideways_sq")}, "which no kernel sums"),
        ({"instrument": "counter", "formula": Mean("nonfinite")}, "a formula makes a gauge"),
    ],
    ids=str,
)
def test_a_contradiction_is_refused(change: dict, complaint: str) -> None:
    """A spec that contradicts itself fails where it is written, with its name."""
    with pytest.raises(ValueError, match=re.escape(complaint)) as failure:
        replace(GAUGE, **change)
    assert change.get("name", GAUGE.name) in str(failure.value)


@pytest.mark.parametrize("change", [{}, {"brief": "Another thing"}, {"instrument": "counter"}], ids=str)
def test_duplicates_fail_at_registration(change: dict) -> None:
    """A name is taken once, whatever else differs."""
    with pytest.raises(ValueError, match=re.escape("optwatch.thing")):
        Catalogue({"a": [GAUGE], "b": [replace(GAUGE, **change)]})


def test_colliding_series_fail_at_registration() -> None:
    """Names that differ in OpenTelemetry but not in Prometheus, and the series of a histogram."""
    with pytest.raises(ValueError, match="both make series"):
        Catalogue(
            {
                "a": [GAUGE, replace(GAUGE, name="optwatch.other")],
                "b": [replace(GAUGE, name="optwatch.other")],
            }
        )
    histogram = MetricSpec("optwatch.wait", "histogram", "s", "A wait", (), buckets=(1.0,))
    count = MetricSpec("optwatch.wait_seconds_count", "gauge", "", "Collides")
    with pytest.raises(ValueError, match="both make series 'optwatch_wait_seconds_count'"):
        Catalogue({"a": [histogram, count]})


def test_lookup() -> None:
    """Specs are found by OpenTelemetry name and by series; an unknown name lists the known ones."""
    assert CATALOGUE.sample("optwatch_step_duration_seconds_bucket") is CATALOGUE["optwatch.step_duration"]
    assert CATALOGUE.sample("optwatch_nonsense") is None
    with pytest.raises(KeyError, match=re.escape("optwatch.rank_up")):
        CATALOGUE["optwatch.nonsense"]


def test_labels_are_checked_against_the_spec() -> None:
    """A sample with missing or extra labels is refused, with both sets named."""
    GAUGE.check_labels({"run_id": "r", "rank": "0"})
    with pytest.raises(ValueError, match=r"\['rank', 'slot'\], expected \['rank', 'run_id'\]"):
        GAUGE.check_labels({"rank": "0", "slot": "exp_avg"})


def test_prometheus_name_is_pure() -> None:
    """Name, instrument and unit decide, nothing else."""
    assert prometheus_name(replace(GAUGE, unit="By")) == "optwatch_thing_bytes"
    assert prometheus_name(replace(GAUGE, instrument="counter", unit="s")) == "optwatch_thing_seconds_total"
    assert prometheus_name(replace(GAUGE, instrument="counter", unit="{step}")) == "optwatch_thing_total"
    assert prometheus_name(replace(GAUGE, instrument="info")) == "optwatch_thing_info"
    assert prometheus_name(replace(GAUGE, name="optwatch.thing.ratio", unit="1")) == "optwatch_thing_ratio"


def test_docs_are_up_to_date() -> None:
    """The committed page is what the generator writes."""
    assert (ROOT / DEFAULT_PATH).read_text(encoding="utf-8") == generate(), (
        "run `make generate` and commit the result"
    )


def test_the_module_writes_the_page(tmp_path: Path) -> None:
    """`python -m optwatch.metrics.docs PATH` writes what `generate` returns."""
    page = tmp_path / "new" / "metrics.md"
    subprocess.run([sys.executable, "-m", "optwatch.metrics.docs", str(page)], check=True, cwd=ROOT)
    assert page.read_text(encoding="utf-8") == generate()


def test_imports_no_torch() -> None:
    """The agent reads the catalogue and has to start in under a second."""
    script = "import sys, optwatch.metrics.catalogue, optwatch.metrics.docs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
