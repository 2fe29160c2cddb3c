# ruff: noqa: E501 - one metric, one line: it reads as the table it is
# fmt: off
"""The catalogue: every metric that optwatch publishes, one line each.

Exporters, dashboards, alert rules, docs/metrics.md and tests read this table. To add a metric, add a line here, and
its value at the source (a formula over summed fields needs no code anywhere else).

`sum()` and `avg()` over any of them mean something; ages are left to the reader, who has the timestamps; a value that
could not be read is absent, never zero.
"""

from __future__ import annotations

from optwatch.metrics.fields import ESTIMATE, SHADOW
from optwatch.metrics.formulas import NUMEL, Cosine, Maximum, Mean, Norm, Ratio, RootMean, RootRatio
from optwatch.metrics.spec import Catalogue, MetricSpec

#: OpenTelemetry's default boundaries are milliseconds; these are seconds, from 100 µs (a small step on a GPU) to a
#: minute (a large model on a CPU).
SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)

R = ("run_id", "rank")
O = (*R, "optimizer")  # noqa: E741 - the letters of the table in docs/metrics.md
G = (*O, "group")
S = (*O, "slot", "group")
BYTES = (*O, "dtype", "device")
STATE = (*O, "slot", "dtype", "device")
GPU = ("gpu",)
RGPU = (*R, "gpu")
M = MetricSpec

RUN = (
    M("optwatch.run", "info", "", "Facts about a rank of a run", (*R, "world_size", "local_rank", "host", "job_id", "pod", "pid", "replicas")),
    M("optwatch.run_state", "gauge", "", "1 for the state the rank is in, 0 for the others", (*R, "state")),
    M("optwatch.rank_up", "gauge", "", "1 while the rank's process holds its board, 0 from its death to the end of the grace period", R),
    M("optwatch.step", "gauge", "{step}", "Number of the newest step seen", R),
    M("optwatch.loss", "gauge", "", "Loss, as the training loop reported it", R),
    M("optwatch.scalar", "gauge", "", "A scalar that the training loop logged, by the name it gave", (*R, "name")),
    M("optwatch.training.tokens", "counter", "{token}", "Tokens trained on, as the training loop counted them", R),
    M("optwatch.training.samples", "counter", "{sample}", "Samples trained on, as the training loop counted them", R),
    M("optwatch.events", "counter", "{event}", "Run events: checkpoints, resumes, conversions of state, jumps of the learning rate, skipped steps, out of memory, and what the training loop reported", (*R, "event")),
    M("optwatch.last_event_timestamp", "gauge", "s", "Unix time of the newest run event of a kind", (*R, "event")),
    M("optwatch.last_step_timestamp", "gauge", "s", "Unix time at which the newest step ended", R),
    M("optwatch.last_sample_timestamp", "gauge", "s", "Unix time of the newest full statistics", R),
    M("optwatch.step_duration", "histogram", "s", "Time from the end of one step to the end of the next", R, buckets=SECONDS),
)

OPTIMIZER = (
    M("optwatch.optimizer", "info", "", "Facts about an optimizer", (*O, "rule", "codec", "backend")),
    M("optwatch.optimizer_step_duration", "histogram", "s", "Time inside optimizer.step()", O, buckets=SECONDS),
    M("optwatch.steps", "counter", "{step}", "Optimizer steps taken by this process", O),
    M("optwatch.steps_skipped", "counter", "{step}", "Optimizer steps in which no weight was updated", O),
    M("optwatch.replicas", "gauge", "", "Ranks that hold the same tensors: divide squares of norms by it before adding them over ranks", O),
    M("optwatch.learning_rate", "gauge", "", "Learning rate of a parameter group", (*O, "param_group")),
)

MEMORY = (
    M("optwatch.optimizer.state", "gauge", "By", "Bytes of optimizer state found: the sum of the storages", STATE),
    M("optwatch.optimizer.state_expected", "gauge", "By", "Bytes of optimizer state that the constructor asked for, over parameters stepped at least once", STATE),
    M("optwatch.parameter", "gauge", "By", "Bytes of the parameters the optimizer holds", BYTES),
    M("optwatch.gradient", "gauge", "By", "Bytes of the gradients at the newest step", BYTES),
    M("optwatch.parameters", "gauge", "{parameter}", "Number of parameters (elements) the optimizer holds", BYTES),
    M("optwatch.host_memory.rss", "gauge", "By", "Resident memory of the training process", R),
    M("optwatch.host_memory.peak", "gauge", "By", "Largest resident memory of the training process so far", R),
)

GRADIENTS = (
    M("optwatch.gradient.norm", "gauge", "", "Norm of the gradients as the optimizer received them", G, formula=Norm("grad_sq")),
    M("optwatch.gradient.norm_before_clipping", "gauge", "", "Norm of all gradients of an optimizer that clips or skips, before it did", O),
    M("optwatch.gradient_clip.ratio", "gauge", "1", "What the optimizer multiplied all gradients by to clip them", O),
    M("optwatch.nonfinite_elements", "counter", "{element}", "Gradient elements that were NaN or infinite", O),
)

UPDATES = (
    M("optwatch.parameter.norm", "gauge", "", "Norm of the weights after the step", G, formula=Norm("weight_sq")),
    M("optwatch.update.norm", "gauge", "", "Norm of what the rule subtracted, learning rate included, weight decay not", G, formula=Norm("update_sq")),
    M("optwatch.update_to_parameter.ratio", "gauge", "1", "Norm of the update over the norm of the weights", G, formula=RootRatio("update_sq", "weight_sq")),
    M("optwatch.moment_gradient_cosine", "gauge", "", "Cosine between the first moment and the gradient", G, formula=Cosine("moment_grad", "exact_sq", "grad_sq")),
    M("optwatch.weights_unchanged.ratio", "gauge", "1", "Weights whose stored value did not change, of all: their update is below the resolution of the dtype", G, formula=Mean("unchanged")),
)

STATE_QUALITY = (
    M("optwatch.update_quantization_error.ratio", "gauge", "1", "Error of the update from storing the state: RMS of u(stored) minus u(exact) over RMS of u(exact); tells whether training is harmed", G, formula=RootRatio("update_error_sq", "update_sq")),
    M("optwatch.quantization_error.ratio", "gauge", "1", "RMS of stored minus exact over RMS of exact; for second moments of their square roots", S, formula=RootRatio("error_sq", "exact_sq")),
    M("optwatch.quantization_underflow.ratio", "gauge", "1", "Non-zero values stored as zero, of all elements", S, formula=Ratio("underflow", NUMEL)),
    M("optwatch.quantization_saturated.ratio", "gauge", "1", "Finite values clipped to the largest their block can hold, of all elements", S, formula=Ratio("saturated", NUMEL)),
    M("optwatch.moment.norm", "gauge", "", "Norm of the exact moment; for second moments of their square roots", S, formula=Norm("exact_sq")),
    M("optwatch.moment.mean", "gauge", "", "Mean of the exact moment", S, formula=Mean("sum")),
    M("optwatch.moment.rms", "gauge", "", "Root mean square of the exact moment; for second moments of their square roots", S, formula=RootMean("exact_sq")),
    M("optwatch.moment.absmax", "gauge", "", "Largest magnitude of the exact moment", S, formula=Maximum("absmax")),
)

FROM_BLOCKS = (
    M("optwatch.estimated_update_quantization_error.ratio", "gauge", "1", "Estimate of update_quantization_error for an optimizer that is not optwatch's: the step is computed once more in fp32 on sampled blocks", G, formula=RootRatio("update_error_sq", "update_sq"), family=ESTIMATE),
    M("optwatch.estimated_quantization_error.ratio", "gauge", "1", "Estimate of quantization_error for an optimizer that is not optwatch's, from sampled blocks", S, formula=RootRatio("error_sq", "exact_sq"), family=ESTIMATE),
    M("optwatch.shadow_update_error.ratio", "gauge", "1", "Estimate, from sampled blocks, of the error that has accumulated in the update since watching began: RMS of the update from the stored state minus the one from a state kept in fp32, over RMS of the latter", (*G, "format"), formula=RootRatio("update_error_sq", "update_sq"), family=SHADOW),
    M("optwatch.shadow_moment_error.ratio", "gauge", "1", "Estimate, from sampled blocks, of the error that has accumulated in a moment since watching began; for second moments in their square roots", (*S, "format"), formula=RootRatio("error_sq", "exact_sq"), family=SHADOW),
)

DEVICE = (
    M("optwatch.device", "info", "", "Facts about a GPU of this node", ("gpu", "index", "model", "driver"), requires="nvidia"),
    M("optwatch.device_up", "gauge", "", "1 while the driver answers for the device, 0 when it was lost", GPU, requires="nvidia"),
    M("optwatch.device.memory.used", "gauge", "By", "Device memory in use, as the driver reports it", GPU, requires="nvidia"),
    M("optwatch.device.memory.free", "gauge", "By", "Device memory free, as the driver reports it", GPU, requires="nvidia"),
    M("optwatch.device.memory.reserved", "gauge", "By", "Device memory kept by driver and firmware", GPU, requires="nvidia"),
    M("optwatch.device.memory.total", "gauge", "By", "Device memory installed", GPU, requires="nvidia"),
    M("optwatch.device.utilization.ratio", "gauge", "1", "Part of the driver's sampling period in which a kernel ran", GPU, requires="nvidia"),
    M("optwatch.device.power", "gauge", "W", "Power drawn", GPU, requires="nvidia"),
    M("optwatch.device.energy", "counter", "J", "Energy drawn since the driver was loaded", GPU, requires="nvidia"),
    M("optwatch.device.temperature", "gauge", "Cel", "Temperature of the chip", GPU, requires="nvidia"),
    M("optwatch.device.ecc_errors", "counter", "{error}", "ECC errors over the device's life", (*GPU, "error"), requires="nvidia"),
    M("optwatch.device.xid_errors", "counter", "{error}", "XID errors that the driver told of since the agent listens", GPU, requires="nvidia"),
    M("optwatch.device_xid", "info", "", "XID errors that the device has had, by number", (*GPU, "xid"), requires="nvidia"),
    M("optwatch.process.device_memory", "gauge", "By", "Device memory that the rank's process holds, as the driver reports it", RGPU, requires="nvidia"),
    M("optwatch.device.clock_throttled", "gauge", "", "1 while the clock is held down for this reason, else 0", (*GPU, "reason"), requires="nvidia"),
)

ALLOCATOR = (
    M("optwatch.allocator.allocated", "gauge", "By", "Bytes in live tensors", RGPU, requires="cuda"),
    M("optwatch.allocator.reserved", "gauge", "By", "Bytes that torch's allocator took from the device", RGPU, requires="cuda"),
    M("optwatch.allocator.active", "gauge", "By", "Bytes in blocks that are in use or waiting for a stream", RGPU, requires="cuda"),
    M("optwatch.allocator.inactive_split", "gauge", "By", "Bytes in free pieces of split blocks: fragmentation", RGPU, requires="cuda"),
    M("optwatch.allocator.allocated_peak", "gauge", "By", "Largest value of allocated bytes; never reset by optwatch", RGPU, requires="cuda"),
    M("optwatch.allocator.reserved_peak", "gauge", "By", "Largest value of reserved bytes; never reset by optwatch", RGPU, requires="cuda"),
    M("optwatch.allocator.retries", "counter", "{retry}", "Allocations that only succeeded after the cache was flushed", RGPU, requires="cuda"),
    M("optwatch.pinned_memory", "gauge", "By", "Host memory that torch's allocator keeps pinned for copies, in use or not", R, requires="cuda"),
    M("optwatch.allocator.ooms", "counter", "{error}", "Allocations that failed", RGPU, requires="cuda"),
)

MONITOR = (
    M("optwatch.build", "info", "", "Version of the agent", ("version", "python")),
    M("optwatch.overhead", "counter", "s", "Time that watching took from the training process", R),
    M("optwatch.adapter_errors", "counter", "{error}", "Errors in reading an optimizer's state; the first one ends the statistics that needed it, bytes and durations go on", O),
    M("optwatch.samples_dropped", "counter", "{sample}", "Samples that were overwritten before the agent read them", R),
    M("optwatch.series_dropped", "counter", "{series}", "Series left out because the cap for a rank was reached", R),
    M("optwatch.boards_skipped", "counter", "{board}", "Boards that could not be read", ("reason",)),
    M("optwatch.nvml_errors", "counter", "{error}", "Driver calls that failed or did not return in time"),
    M("optwatch.otlp_exports", "counter", "{export}", "Pushes that an OTLP collector took", requires="otlp"),
    M("optwatch.otlp_failures", "counter", "{export}", "Pushes that did not reach the OTLP collector: refused or not answered, or dropped from the full queue", ("reason",), requires="otlp"),
    M("optwatch.store_failures", "counter", "{failure}", "Times the local store could not be written; it rests half a minute after each"),
    M("optwatch.scrape_duration", "gauge", "s", "Time the agent took to render the newest scrape"),
)

CATALOGUE = Catalogue(
    {
        "Run": RUN,
        "Optimizer": OPTIMIZER,
        "Memory": MEMORY,
        "Gradients": GRADIENTS,
        "Updates": UPDATES,
        "Optimizer state": STATE_QUALITY,
        "Optimizer state, from sampled blocks": FROM_BLOCKS,
        "Devices": DEVICE,
        "CUDA allocator": ALLOCATOR,
        "The monitor itself": MONITOR,
    }
)
