"""Hugging Face's Trainer: ``Trainer(..., callbacks=[WatchCallback()])``.

Without it, `optwatch run` watches the optimizer all the same; the callback adds the loss, tokens and evaluations.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from optwatch.hooks import Watch, watch


class WatchCallback(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Watches a Trainer's optimizer from the first step to the last; ``options`` are those of `optwatch.watch`."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.watch: Watch | None = None
        self._tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin: the Trainer has made model and optimizer by now."""
        self.watch = watch(given["optimizer"], given["model"], **self.options)
        self._tokens = int(state.num_input_tokens_seen)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        """Take the newest loss, and tokens if the Trainer counts them (``include_num_input_tokens_seen``)."""
        if self.watch is None:
            return
        if "loss" in (logs or {}):
            self.watch.log(loss=logs["loss"])
        # The Trainer's number is of all processes.
        tokens, self._tokens = (
            int(state.num_input_tokens_seen) - self._tokens,
            int(state.num_input_tokens_seen),
        )
        if tokens > 0 and state.is_world_process_zero:
            self.watch.count(tokens=tokens)

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Mark the moment."""
        if self.watch is not None:
            self.watch.event("evaluation")

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """End watching; the last values stay visible for a while."""
        if self.watch is not None:
            self.watch.close()
