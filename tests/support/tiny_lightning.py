"""A LightningModule around a tiny classifier."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from tiny_training import Texts


def module_class(package: Any) -> Any:
    """A subclass of the LightningModule of `lightning.pytorch` or `pytorch_lightning`."""

    class Classifier(package.LightningModule):
        def __init__(self, network: torch.nn.Module):
            super().__init__()
            self.network = network.train()

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            loss: torch.Tensor = self.network(**batch).loss
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
            output = self.network(**batch)
            right = (output.logits.argmax(-1) == batch["labels"]).float().mean()
            self.log_dict({"val_loss": output.loss, "val_accuracy": right}, sync_dist=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Classifier


Classifier = module_class(pl)


def loader() -> DataLoader[dict[str, torch.Tensor]]:
    """The texts in batches of four."""
    return DataLoader(Texts(), batch_size=4)
