"""The two parts of a NeuroMerging merge, computed once and kept on the disk, so that any lambdas' model follows.

The merged weights are ``theta_0 + lambda_1 psi_par + lambda_2 psi_orth``, linear in the lambdas. The engine writes each
term in float32 as a checkpoint of its own, which transformers loads like the model itself (its conversions of names and
shapes are linear too). The terms are kept by the names that parameters have in memory, in files that are mapped, so
that they take no private memory.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from neuromerge_hf.assembly.companions import write_companions
from neuromerge_hf.engine.merge import merge_weights
from neuromerge_hf.engine.method import Method, Recorder
from neuromerge_hf.engine.writer import CheckpointWriter
from neuromerge_hf.errors import MergeError
from neuromerge_hf.kernel import elect_entries, neuron_change
from neuromerge_hf.methods.neuromerging import NeuroMerging, trim_block
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block, Layout

Load = Callable[..., Any]
"""`from_pretrained` of the model's class."""


class DeltaOnly(Method[Any]):
    """What some lambdas change in the base, without the base."""

    def __init__(self, fitted: NeuroMerging, lambda_parallel: float, lambda_orthogonal: float):
        super().__init__(fitted.config, fitted.trimmings)
        self._lambdas = lambda_parallel, lambda_orthogonal

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        trim_block(x, unit, [trimming.threshold for trimming in self.trimmings])
        if unit.is_neuronal:
            return neuron_change(x.transpose(0, 1), *self._lambdas)
        return elect_entries(x[1:, 0]).mul_(self._lambdas[1]).float().unsqueeze(0)


class LambdaComponents:
    """The terms of a plan's merged weights, in a folder.

    Args:
        plan: what is merged, from files that are there.
        folder: exists and is empty; it gets three times the model in float32, and while a term is computed four.
        load: `from_pretrained` of the model's class.
        device: where to compute.
    """

    def __init__(self, plan: MergePlan, folder: Path, load: Load, device: torch.device, trust_remote_code: bool):
        self._plan = plan
        self._folder = folder
        self._load = load
        self._device = device
        self._trust_remote_code = trust_remote_code

    def compute(self, fitted: NeuroMerging) -> None:
        """Compute the parts for some trim thresholds; those of an earlier call are replaced.

        The inputs are read once for each part.

        Raises:
            MergeError: if a weight is NaN or infinite.
        """
        single = [dataclasses.replace(unit, dtype=_single(unit.dtype)) for unit in self._plan.units]
        parallel, orthogonal = DeltaOnly(fitted, 1, 0), DeltaOnly(fitted, 0, 1)
        if not self._file("base").exists():
            self._write(self._folder / "model", self._plan.units, map(_copied, self._plan.units), parallel)
            self._keep("base", single, map(_copied, single), parallel)
        changed = [unit for unit in single if unit.task_vectors]
        self._keep("parallel", single, changed, parallel)
        self._keep("orthogonal", single, changed, orthogonal)

    def load_base(self, **kwargs: Any) -> PreTrainedModel:
        """The base in the dtype of the merged model, and with its vocabulary, in evaluation mode."""
        model: PreTrainedModel = self._load(self._folder / "model", **kwargs)
        return model.eval()

    @torch.no_grad()
    def put(self, model: torch.nn.Module, lambda_parallel: float, lambda_orthogonal: float) -> None:
        """Turn a model that `load_base` returned into the merge with these lambdas, in place.

        Raises:
            MergeError: if parameters are not in memory.
        """
        weights = {"parallel": lambda_parallel, "orthogonal": lambda_orthogonal}
        with ExitStack() as stack:
            base = stack.enter_context(safe_open(self._file("base"), "pt"))
            parts = [
                (stack.enter_context(safe_open(self._file(name), "pt")), weight)
                for name, weight in weights.items()
                if weight
            ]
            for name, tensor in _floating(model).items():
                if tensor.is_meta:
                    raise MergeError(f"{name} is not in memory, where lambdas are tried out: leave device_map= out.")
                if name in base.keys():  # noqa: SIM118  # the head that the base lacks is not in it
                    merged = base.get_tensor(name)
                    for part, weight in parts:
                        merged = merged.add(part.get_tensor(name), alpha=weight)
                    tensor.copy_(merged)

    def _keep(self, name: str, units: Iterable[Unit], computed: Iterable[Unit], method: Method[Any]) -> None:
        """Keep a term by the names that parameters have in memory."""
        stored = self._folder / "stored"
        self._write(stored, units, computed, method)
        model, info = self._load(stored, dtype=torch.float32, output_loading_info=True)
        tensors = {key: tensor.contiguous() for key, tensor in _floating(model).items()}
        save_file({key: tensor for key, tensor in tensors.items() if key not in info["missing_keys"]}, self._file(name))
        shutil.rmtree(stored)

    def _write(self, folder: Path, units: Iterable[Unit], computed: Iterable[Unit], method: Method[Any]) -> None:
        """Write a checkpoint of all units, of which those that are not computed are 0."""
        folder.mkdir()
        writer = CheckpointWriter(folder, list(units), "5GB")  # what is not written of a new file is 0
        try:
            plan = dataclasses.replace(self._plan, units=tuple(computed))
            merge_weights(plan, method, writer, self._device, self._plan.threads)
        finally:
            writer.close()
        write_companions(self._plan, folder, self._trust_remote_code)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


def _single(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def _copied(unit: Unit) -> Unit:
    return dataclasses.replace(unit, layout=Layout(1, 1, unit.entries, 1), is_neuronal=False, task_vectors=())


def _floating(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a floating-point dtype, by name; of tied ones, the first."""
    persistent = model.state_dict(keep_vars=True)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: named[name].detach() for name in persistent if name in named and named[name].is_floating_point()}
