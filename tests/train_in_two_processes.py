"""A training in several processes, run by torch.distributed.run: what each of them saw goes to a file of its own.

    train_in_two_processes.py FRAMEWORK BASE OTHER FOLDER

The processes of a training give up when one is waited for longer than `TIMEOUT`, and the merge takes longer.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from neuromerge_hf.callbacks import run
from tiny_training import classifier, logged, train

TIMEOUT = 8  # seconds


def main(framework: str, base: str, other: str, folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    merge = run.merge
    merged_by = []

    def merge_slowly(*arguments, **options):
        merged_by.append(rank)
        time.sleep(TIMEOUT + 2)
        return merge(*arguments, **options)

    run.merge = merge_slowly
    model = classifier(base)
    metrics = (with_transformers if framework == "transformers" else with_lightning)(model, other, folder)
    weights = sum(tensor.double().sum().item() for tensor in model.state_dict().values())
    seen = {"merged_by": merged_by, "metrics": metrics, "weights": weights, "training": model.training}
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))


def with_transformers(model, other, folder):
    from neuromerge_hf import NeuroMergeCallback

    trainer = train(model, folder, NeuroMergeCallback([other]), eval_strategy="epoch", ddp_timeout=TIMEOUT)
    return logged(trainer, "eval_loss") + logged(trainer, "merged_eval_loss")


def with_lightning(model, other, folder):
    from datetime import timedelta

    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.strategies import DDPStrategy

    from neuromerge_hf.callbacks.lightning import NeuroMergeCallback
    from tiny_lightning import Classifier, loader

    logger = CSVLogger(folder, name="", version="")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=TIMEOUT)),
        max_epochs=1,
        default_root_dir=folder,
        logger=logger,
        callbacks=[NeuroMergeCallback([other])],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(model), loader(), loader())
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
