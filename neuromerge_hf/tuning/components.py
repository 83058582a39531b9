"""The parallel and the orthogonal part of a merge, computed once and stored on disk for any lambdas.

The merged weights ``theta_0 + lambda_1 psi_par + lambda_2 psi_orth`` are linear in the lambdas. The engine writes each
term as a float32 checkpoint of its own, which transformers loads like the model itself (its conversions of names and
shapes are linear too). The loaded terms are stored by the in-memory names of their parameters, in memory-mapped files
that take no private memory.
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
from neuromerge_hf.engine.method import Method, Recorder, trim_block
from neuromerge_hf.engine.passes import Passes
from neuromerge_hf.engine.writer import CheckpointWriter
from neuromerge_hf.errors import MergeError
from neuromerge_hf.kernel import elect_entries, neuron_change
from neuromerge_hf.methods.neuromerging import NeuroMerging
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.finite import dtype_that_holds, is_finite, largest_finite, name_of
from neuromerge_hf.storage.layout import Block, Layout

Load = Callable[..., Any]
"""`from_pretrained` of the model's class."""


class DeltaOnly(Method[Any]):
    """The change that NeuroMerging with given lambdas makes to the base, without the base itself."""

    def __init__(self, fitted: NeuroMerging, lambda_parallel: float, lambda_orthogonal: float):
        super().__init__(fitted.config, fitted.trimmings)
        self._lambdas = lambda_parallel, lambda_orthogonal

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        trim_block(x, unit, [trimming.threshold for trimming in self.trimmings])
        if unit.is_neuronal:
            return neuron_change(x.transpose(0, 1), *self._lambdas)
        return elect_entries(x[1:, 0]).mul_(self._lambdas[1]).float().unsqueeze(0)


class LambdaComponents:
    """The three terms of a plan's merged weights, stored in a folder.

    Args:
        plan: the plan of the merge, whose files are on this machine.
        folder: an empty folder. It will hold the model three times in float32, and four times during `compute`.
        load: `from_pretrained` of the model's class.
        device: the device that computes the terms.
        trust_remote_code: whether the models' custom code may run.
    """

    def __init__(self, plan: MergePlan, folder: Path, load: Load, device: torch.device, trust_remote_code: bool):
        self._plan = plan
        self._folder = folder
        self._load = load
        self._device = device
        self._trust_remote_code = trust_remote_code

    def compute(self, fitted: NeuroMerging) -> None:
        """Compute the parts for the trim thresholds of `fitted`. They replace those of an earlier call.

        The inputs are read once for each part.

        Raises:
            MergeError: if a weight is NaN or infinite.
        """
        single = [dataclasses.replace(unit, dtype=_to_float32(unit.dtype)) for unit in self._plan.units]
        parallel, orthogonal = DeltaOnly(fitted, 1, 0), DeltaOnly(fitted, 0, 1)
        if not self._file("base").exists():
            self._write_term(self.base_folder, self._plan.units, map(_unchanged, self._plan.units), parallel)
            self._store_term("base", single, map(_unchanged, single), parallel)
        changed = [unit for unit in single if unit.task_vectors]
        self._store_term("parallel", single, changed, parallel)
        self._store_term("orthogonal", single, changed, orthogonal)

    @property
    def base_folder(self) -> Path:
        """The folder of the base in the merged model's dtype and with its vocabulary, for `from_pretrained`."""
        return self._folder / "model"

    def load_base(self, **kwargs: Any) -> PreTrainedModel:
        """Load the base in the merged model's dtype and with its vocabulary, in evaluation mode."""
        model: PreTrainedModel = self._load(self.base_folder, **kwargs)
        return model.eval()

    @torch.no_grad()
    def set_lambdas(self, model: torch.nn.Module, lambda_parallel: float, lambda_orthogonal: float) -> None:
        """Turn a model that `load_base` returned into the merge with these lambdas, in place.

        Raises:
            MergeError: if a parameter is not in memory, but on the meta device, or its values are too large for its
                dtype.
        """
        weights = {"parallel": lambda_parallel, "orthogonal": lambda_orthogonal}
        with ExitStack() as stack:
            base = stack.enter_context(safe_open(self._file("base"), "pt"))
            parts = [
                (stack.enter_context(safe_open(self._file(name), "pt")), weight)
                for name, weight in weights.items()
                if weight
            ]
            for name, tensor in _floating_tensors(model).items():
                if tensor.is_meta:
                    raise MergeError(f"{name} is not in memory, where lambdas are tried out: leave device_map= out.")
                if name in base.keys():  # noqa: SIM118  # a head that the base lacks is not a key
                    merged = base.get_tensor(name)
                    for part, weight in parts:
                        merged = merged.add(part.get_tensor(name), alpha=weight)
                    tensor.copy_(merged)
                    if not is_finite(tensor) and is_finite(base.get_tensor(name)):
                        raise MergeError(
                            f"{name} exceeds {name_of(tensor.dtype)} with lambda_parallel={lambda_parallel:g} and "
                            f"lambda_orthogonal={lambda_orthogonal:g}. Try smaller lambdas (grid=), or pass "
                            f'dtype="{dtype_that_holds(largest_finite(merged))}".'
                        )

    def _store_term(self, name: str, units: Iterable[Unit], computed: Iterable[Unit], method: Method[Any]) -> None:
        """Store a term by the in-memory names of its parameters."""
        stored = self._folder / "stored"
        self._write_term(stored, units, computed, method)
        model, info = self._load(stored, dtype=torch.float32, output_loading_info=True)
        tensors = {key: tensor.contiguous() for key, tensor in _floating_tensors(model).items()}
        save_file({key: tensor for key, tensor in tensors.items() if key not in info["missing_keys"]}, self._file(name))
        shutil.rmtree(stored)

    def _write_term(self, folder: Path, units: Iterable[Unit], computed: Iterable[Unit], method: Method[Any]) -> None:
        """Write a checkpoint of all units. Units that are not in `computed` are 0."""
        folder.mkdir()
        writer = CheckpointWriter(folder, list(units), "5GB")  # unwritten parts of a new file are 0
        try:
            work = dataclasses.replace(self._plan.work, units=tuple(computed))
            merge_weights(Passes(work, self._device, self._plan.threads), method, writer)
        finally:
            writer.close()
        write_companions(self._plan, folder, self._trust_remote_code)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


def _to_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def _unchanged(unit: Unit) -> Unit:
    return dataclasses.replace(unit, layout=Layout(1, 1, unit.entries, 1), is_neuronal=False, task_vectors=())


def _floating_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The floating-point parameters and persistent buffers, by name. Tied ones have their first name only."""
    persistent = model.state_dict(keep_vars=True)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: named[name].detach() for name in persistent if name in named and named[name].is_floating_point()}
