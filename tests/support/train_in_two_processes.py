"""Training in two processes with each framework in turn. Each process writes its results to a file of its own.

A process that waits for the other longer than `TIMEOUT` fails. The first merge takes longer than that.
"""

import json
import os
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

from neuromerge_hf.callbacks.common import merging
from tiny_training import classifier, logged, make_trainer, train

TIMEOUT = 5  # seconds


def train_in_turn(rank: int, port: int, everyone: Barrier, base: Path, other: Path, folder: Path) -> None:
    """Train as process `rank` of two, with the callback, and write the results to ``<framework>/rank-<rank>.json``.

    Args:
        rank: The number of this process.
        port: The port at which the first process waits for the second.
        everyone: A barrier for both processes before their first training. Without it, one would time out while the
            other still imports.
        base: The model that is trained.
        other: The expert that is merged with what was trained.
        folder: The folder in which each training gets its own.
    """
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)

    import lightning.pytorch  # noqa: F401, so that the other process need not wait for it later

    merge = merging.merge_spec  # type: ignore[attr-defined]
    merged_by: list[int] = []

    def merge_slowly(*arguments: Any, **options: Any) -> Any:
        if not merged_by:
            time.sleep(TIMEOUT + 1)
        merged_by.append(rank)
        return merge(*arguments, **options)

    merging.merge_spec = merge_slowly  # type: ignore[attr-defined]
    everyone.wait()
    for name, train_with in WAYS.items():
        model = classifier(base)
        metrics = train_with(model, other, folder / name)
        weights = sum(whole(tensor).double().sum().item() for tensor in model.state_dict().values())
        seen = {"merges": len(merged_by), "metrics": metrics, "weights": weights, "training": model.training}
        (folder / name / f"rank-{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()  # else gloo's threads can abort a process that ends (pytorch #190489)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def with_transformers(model: Any, other: Path, folder: Path) -> list[dict[str, float]]:
    from neuromerge_hf import NeuroMergeCallback

    trainer = train(model, folder, NeuroMergeCallback([other]), eval_strategy="epoch", ddp_timeout=TIMEOUT)
    return logged(trainer, "eval_loss") + logged(trainer, "merged_eval_loss")


def with_fsdp(model: Any, other: Path, folder: Path) -> list[dict[str, float]]:
    """Train with FSDP on the CPU. accelerate shards only on accelerators unless its state is changed."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.tensor import DTensor
    from transformers import TrainerCallback

    from neuromerge_hf import NeuroMergeCallback

    class ForceFSDP(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.accelerator.state.distributed_type = DistributedType.FSDP

    trainer = make_trainer(model, folder, NeuroMergeCallback([other]), ForceFSDP(), max_grad_norm=0)
    trainer.is_fsdp_enabled = True
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=False,
    )
    trainer.train()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return logged(trainer, "merged_")


def with_lightning(model: Any, other: Path, folder: Path) -> dict[str, float]:
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


def with_accelerate(model: Any, other: Path, folder: Path) -> dict[str, float]:
    """Train in a loop with accelerate, and tune the lambdas with both processes."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    from neuromerge_hf import TuningGrid
    from neuromerge_hf.callbacks.accelerate import merge_at_end
    from tiny_training import Texts

    accelerator = Accelerator(cpu=True, project_dir=folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, batches = accelerator.prepare(model.train(), optimizer, DataLoader(Texts(), batch_size=4))

    @torch.no_grad()
    def evaluate(model: Any) -> dict[str, float]:
        model.eval()
        losses = [model(**batch).loss for batch in batches]
        return {"loss": accelerator.reduce(torch.stack(losses).mean(), "mean").item()}

    grid = TuningGrid(parallel=(0.0, 0.5), orthogonal=(0.6, 1.0), rounds=0)
    with merge_at_end(accelerator, model, [other], evaluate=evaluate, tune=grid) as merging:
        for batch in batches:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    return merging.metrics


WAYS = {"ddp": with_transformers, "lightning": with_lightning, "fsdp": with_fsdp, "accelerate": with_accelerate}
