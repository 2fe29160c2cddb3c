"""Lightning: ``Trainer(callbacks=[WatchCallback()])``, under either name of the package.

Without it, `optwatch run` watches the optimizers all the same; the callback adds the loss and evaluations.
"""

from __future__ import annotations

import sys
from typing import Any

from optwatch.hooks import Watch, watch

# Both names of the package have classes of their own: take the one that the script has imported.
if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
    from pytorch_lightning import Callback
else:
    from lightning.pytorch import Callback


class WatchCallback(Callback):  # type: ignore[misc]  # its type depends on which package is there
    """Watches all optimizers of a fit; ``options`` are those of `optwatch.watch`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.watch: Watch | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin: the strategy has made the optimizers by now."""
        self.watch = watch(trainer.optimizers, trainer.strategy.model or pl_module, **self.options)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take what ``training_step`` returned as the loss."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self.watch is not None and loss is not None:
            self.watch.log(loss=loss)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Mark the moment."""
        if self.watch is not None and not trainer.sanity_checking:
            self.watch.event("evaluation")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End watching; the last values stay visible for a while."""
        if self.watch is not None:
            self.watch.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End watching, as failed."""
        if self.watch is not None:
            self.watch.__exit__(type(exception), exception, exception.__traceback__)
