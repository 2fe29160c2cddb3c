"""Rows of the optimizer dashboard: what gradients, updates and stored state look like."""

from __future__ import annotations

from dashboards.panels import Panel, Query, Row
from dashboards.queries import ERROR, OPTIMIZER, rate, series, worst

NO_CLIPPING = "clips nothing"
NOT_FOREIGN = "only of optimizers that are not optwatch's"
NO_SHADOW = "only with shadow="

GRADIENTS = Row(
    "Gradients",
    (
        Panel(
            "Gradient norm",
            "none",
            "Norm of the gradients of each group, the largest of the ranks. Good: slow drift, no spikes, groups"
            " within a few orders of magnitude of each other; else see GradientNormSpike.",
            [worst("gradient.norm", "optimizer", "group")],
            log=True,
        ),
        Panel(
            "Non-finite gradient elements a second",
            "short",
            "Gradient elements that were NaN or infinite. Good: none, or under loss scaling single bursts; else"
            " see NonFiniteGradients.",
            [
                rate(
                    "nonfinite_elements",
                    "optimizer",
                    "rank",
                    matchers=OPTIMIZER,
                    legend="{{optimizer}} rank {{rank}}",
                )
            ],
            minimum=0,
        ),
        Panel(
            "Cosine of first moment and gradient",
            "none",
            "How far the gradient points where the first moment points. Good: steady and above 0; else, near 0,"
            " noise rules: a larger batch or a lower beta1 helps.",
            [worst("moment_gradient_cosine", "optimizer", "group")],
        ),
        Panel(
            "Norm before clipping",
            "none",
            "Norm of all gradients before an optimizer with max_grad_norm= clipped them, the largest of the"
            " ranks. Good: slow drift; else see GradientNormSpike: a spike that clipping caught is seen here only.",
            [worst("gradient.norm_before_clipping", "optimizer", matchers=OPTIMIZER)],
            log=True,
            width=12,
            no_value=NO_CLIPPING,
        ),
        Panel(
            "Left by clipping",
            "percentunit",
            "What all gradients were multiplied by, the smallest of the ranks. Good: 100 % at most steps; else it"
            " is max_grad_norm= that sets the size of a step: raise it, or lower the rate.",
            [
                Query(
                    f"min by (optimizer) ({series('gradient_clip.ratio', OPTIMIZER)})",
                    "{{optimizer}}",
                )
            ],
            minimum=0,
            width=12,
            no_value=NO_CLIPPING,
        ),
    ),
)

UPDATES = Row(
    "Updates",
    (
        Panel(
            "Update over weight",
            "percentunit",
            "Norm of the update over the norm of the weights, by group. Good: about 0.01 % to 1 %; else see"
            " UpdateRatioTooHigh and UpdateRatioTooLow.",
            [worst("update_to_parameter.ratio", "optimizer", "group")],
            log=True,
            width=12,
        ),
        Panel(
            "Weights unchanged",
            "percentunit",
            "Weights whose stored value a step did not change. Good: far below 100 %; else the update is below"
            " the resolution of the weights' dtype: see WeightsNotMoving.",
            [worst("weights_unchanged.ratio", "optimizer", "group")],
            minimum=0,
            width=12,
        ),
        Panel(
            "Update norm",
            "none",
            "Norm of what is subtracted from the weights, by group. Good: follows the learning rate; else see"
            " UpdateRatioTooHigh, and NonFiniteUpdates where a line ends.",
            [worst("update.norm", "optimizer", "group")],
            log=True,
            width=12,
        ),
        Panel(
            "Weight norm",
            "none",
            "Norm of the weights after the step, by group. Good: slow and smooth; else, where it grows without"
            " end, raise the weight decay or lower the rate.",
            [worst("parameter.norm", "optimizer", "group")],
            width=12,
        ),
    ),
)

#: Twelve lines in a legend, one for each slot and group, need their room.
STATE = Row(
    "Optimizer state",
    (
        Panel(
            "Update error from storing the state",
            "percentunit",
            "RMS of u(stored) minus u(exact) over RMS of u(exact): tells whether training is harmed. Good: below"
            " 10 %; else see QuantizationErrorHigh and QuantizationErrorSpike.",
            [worst("update_quantization_error.ratio", "optimizer", "group")],
            log=True,
            width=12,
            height=10,
            steps=ERROR,
        ),
        Panel(
            "Quantisation error of the state",
            "percentunit",
            "RMS of stored minus exact over RMS of exact; for second moments of their roots. Good: steady; else"
            " look at the update error beside it, which is the one that matters.",
            [worst("quantization_error.ratio", "slot", "group")],
            log=True,
            width=12,
            height=10,
        ),
        Panel(
            "Stored as zero",
            "percentunit",
            "Non-zero values stored as zero, of all. Good: 0 for second moments, some percent for first moments;"
            " else see SecondMomentUnderflow: a zero there blows the update up.",
            [worst("quantization_underflow.ratio", "slot", "group")],
            minimum=0,
            width=12,
            height=10,
        ),
        Panel(
            "Clipped",
            "percentunit",
            "Finite values clipped to the largest that their block can hold, of all. Good: about 0; else see"
            " CodecSaturated.",
            [worst("quantization_saturated.ratio", "slot", "group")],
            minimum=0,
            width=12,
            height=10,
        ),
        Panel(
            "Moment, root mean square",
            "none",
            "RMS of the exact moments, for second moments of their roots. Good: follows the gradients, slowly;"
            " else look for a resume that lost the moments.",
            [worst("moment.rms", "slot", "group")],
            log=True,
            width=12,
            height=10,
        ),
        Panel(
            "Moment, mean",
            "none",
            "Mean of the exact moments. Good: near 0 for first moments, above 0 for second moments; else"
            " gradients have a direction that they never leave: look at the data.",
            [worst("moment.mean", "slot", "group")],
            width=12,
            height=10,
        ),
        Panel(
            "Moment, largest magnitude",
            "none",
            "Good: within a few orders of magnitude of the RMS; else outliers make coarse blocks: look at the"
            " update error, and keep the group in fp32 if that is high.",
            [worst("moment.absmax", "slot", "group")],
            log=True,
            width=12,
            height=10,
        ),
        Panel(
            "Moment, norm",
            "none",
            "Norm of the exact moments, for second moments of their roots. Good: slow and smooth; else, where a"
            " line ends, it is NaN: see NonFiniteUpdates.",
            [worst("moment.norm", "slot", "group")],
            log=True,
            width=12,
            height=10,
        ),
    ),
)

BLOCKS = Row(
    "From sampled blocks",
    (
        Panel(
            "Estimated update error",
            "percentunit",
            "Update error of an optimizer that is not optwatch's: the step is computed once more in fp32 on"
            " sampled blocks of its state. Good: below 10 %; else choose another format: shadow= and what_if="
            " compare them.",
            [worst("estimated_update_quantization_error.ratio", "optimizer", "group")],
            log=True,
            width=12,
            height=10,
            steps=ERROR,
            no_value=NOT_FOREIGN,
        ),
        Panel(
            "Estimated quantisation error of the state",
            "percentunit",
            "RMS of stored minus exact over RMS of exact, for second moments of their roots, on the same blocks."
            " Good: steady; else look at the update error beside it, which is the one that matters.",
            [worst("estimated_quantization_error.ratio", "slot", "group")],
            log=True,
            width=12,
            height=10,
            no_value=NOT_FOREIGN,
        ),
        Panel(
            "Update error that accumulated",
            "percentunit",
            "Update from the stored state against the one from a copy kept in fp32 since watching began; of the formats"
            " in what_if=, too. Good: below 10 %, and no longer rising; else choose the format that stays below.",
            [worst("shadow_update_error.ratio", "optimizer", "group", "format")],
            log=True,
            width=12,
            height=10,
            steps=ERROR,
            no_value=NO_SHADOW,
        ),
        Panel(
            "Error of the moments that accumulated",
            "percentunit",
            "Stored moments against a copy kept in fp32 since watching began, for second moments of their roots."
            " Good: levels off after some times 1 / (1 - beta) steps; else, in a rise without end, the format has"
            " a bias: choose another.",
            [worst("shadow_moment_error.ratio", "slot", "group", "format")],
            log=True,
            width=12,
            height=10,
            no_value=NO_SHADOW,
        ),
    ),
)
