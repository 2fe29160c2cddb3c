"""A Lightning Trainer."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from optwatch.integrations.lightning import WatchCallback
from optwatch.optim import AdamW


class Model(lightning.LightningModule):
    """Learns to give back what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """The mean squared error."""
        (x,) = batch
        return nn.functional.mse_loss(self.net(x), x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An 8-bit AdamW."""
        return AdamW(self.parameters(), lr=1e-3, state="int8")


lightning.seed_everything(0, verbose=False)
data = DataLoader(TensorDataset(torch.randn(64, 64)), batch_size=8)
trainer = lightning.Trainer(
    max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[WatchCallback()],  # this line
)  # fmt: skip
trainer.fit(Model(), data)
print(f"trained for {trainer.global_step} steps")
