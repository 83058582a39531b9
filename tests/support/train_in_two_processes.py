"""Trainings in several processes, run by torch.distributed.run: what each of them saw goes to a file of its own.

    train_in_two_processes.py BASE OTHER FOLDER

The processes give up when one is waited for longer than `TIMEOUT`, and the first merge takes longer.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from neuromerge_hf.callbacks.common import run
from tiny_training import classifier, logged, make_trainer, train

TIMEOUT = 15  # seconds


def main(base: str, other: str, folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    merge = run.merge
    merged_by = []

    def merge_slowly(*arguments, **options):
        if not merged_by:
            time.sleep(TIMEOUT + 1)
        merged_by.append(rank)
        return merge(*arguments, **options)

    run.merge = merge_slowly
    for name, train_with in {"ddp": with_transformers, "lightning": with_lightning, "fsdp": with_fsdp}.items():
        model = classifier(base)
        metrics = train_with(model, other, folder / name)
        weights = sum(whole(tensor).double().sum().item() for tensor in model.state_dict().values())
        seen = {"merges": len(merged_by), "metrics": metrics, "weights": weights, "training": model.training}
        (folder / name / f"rank-{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()  # else gloo's threads can abort a process that ends (pytorch #190489)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def with_transformers(model, other, folder):
    from neuromerge_hf import NeuroMergeCallback

    trainer = train(model, folder, NeuroMergeCallback([other]), eval_strategy="epoch", ddp_timeout=TIMEOUT)
    return logged(trainer, "eval_loss") + logged(trainer, "merged_eval_loss")


def with_fsdp(model, other, folder):
    """accelerate shards models on accelerators alone; told to, it does so on the CPU as well."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.tensor import DTensor
    from transformers import TrainerCallback

    from neuromerge_hf import NeuroMergeCallback

    class Insist(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.accelerator.state.distributed_type = DistributedType.FSDP

    trainer = make_trainer(model, folder, NeuroMergeCallback([other]), Insist(), max_grad_norm=0)
    trainer.is_fsdp_enabled = True
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=False,
    )
    trainer.train()
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    return logged(trainer, "merged_")


def with_lightning(model, other, folder):
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.strategies import DDPStrategy

    from neuromerge_hf.callbacks.lightning import NeuroMergeCallback
    from tiny_lightning import Classifier, loader

    logger = CSVLogger(folder, name="", version="")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
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
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
