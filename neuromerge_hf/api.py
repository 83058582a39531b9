"""`merge`: from ids and paths to a complete directory."""

import os
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import tqdm

from neuromerge_hf.assembly.report import make_report
from neuromerge_hf.config import MergeConfig, NeuroMergingConfig
from neuromerge_hf.engine.device import find_device
from neuromerge_hf.engine.merge import merge_weights
from neuromerge_hf.engine.method import Method
from neuromerge_hf.engine.statistics import StatisticsCollector
from neuromerge_hf.engine.writer import CheckpointWriter, check_shard_size
from neuromerge_hf.errors import Problems
from neuromerge_hf.folder.diagnostics import Diagnostics
from neuromerge_hf.folder.directory import directory_in_the_making
from neuromerge_hf.folder.recipe import InputHasher, Recipe, load_recipe
from neuromerge_hf.folder.report import MergeReport
from neuromerge_hf.methods import fit_method
from neuromerge_hf.methods.neuromerging import NeuroMerging
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.planning.preflight import check_output
from neuromerge_hf.planning.resolve import ModelId, find_models
from neuromerge_hf.storage.files import HEADS


def merge(
    models: Sequence[ModelId],
    output_dir: str | os.PathLike[str],
    *,
    base_model: ModelId | None = None,
    config: MergeConfig | None = None,
    dtype: str | torch.dtype = "auto",
    tokenizer: str = "base",
    chat_template: str | None = None,
    merge_heads: bool = False,
    max_shard_size: str | int = "5GB",
    tuned_on: str | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Merge fine-tunes of one base model, by NeuroMerging (Fang et al., arXiv:2503.05320) or the method of `config`.

    Args:
        models: the experts: full checkpoints and PEFT adapters, mixed freely. Each is a folder or an id on the Hub,
            which may go on with a folder of the repository, and may end in ``@revision``.
        output_dir: where the merged model is written: weights, configuration, tokenizer, the experts' heads, and the
            recipe that reproduces it. A directory that exists is complete.
        base_model: the model that they were fine-tuned from; found from the adapters where they agree.
        config: the method and its hyper-parameters: a `NeuroMergingConfig`, which is the default, an `AverageConfig`,
            `TaskArithmeticConfig`, `TIESConfig`, `DARETIESConfig` or `PCBConfig`.
        dtype: of the merged weights: "auto" for each tensor's own dtype in the base, or "float32", "float16",
            "bfloat16". The arithmetic is always float32.
        tokenizer: whose tokenizer the merged model gets: "base", the name or id of an expert, or "union" for the base's
            with the tokens that were added to the experts'. Where vocabularies differ, the rows of the embeddings are
            aligned by the text of their tokens. A token that the base lacks takes the mean over the experts that have
            it; an expert that lacks a token changes nothing there. Rows beyond the tokens are those of the model whose
            tokenizer it is; new tokens of a union are put there first.
        chat_template: whose chat template it gets: "base", or the name or id of an expert. By default the one that
            comes with the tokenizer.
        merge_heads: merge heads that the base lacks, too, where all are of one class, shape and set of labels: each
            parameter is the mean over the experts, because there is no base to take differences from. By default each
            expert's head is kept as it is, apart.
        max_shard_size: the largest size of one weight file ("5GB").
        tuned_on: what the hyper-parameters were chosen on, if on data, to be said in recipe, report and card.
        device: where to compute; the accelerator that accelerate sees, or the CPU.
        threads: how many threads to compute with; all processors that this process may use.
        overwrite: replace an output directory that is not empty.
        token: for private and gated repositories.
        trust_remote_code: run model code from the repositories.

    Raises:
        MergeError: if the models cannot be merged. Nothing is left behind.
    """
    target = Path(output_dir).expanduser().absolute()
    problems = Problems()
    problems.attempt(partial(check_output, target, overwrite))
    problems.attempt(partial(check_shard_size, max_shard_size))
    compute_device = problems.attempt(partial(find_device, device))
    found = find_models(models, base_model, token, problems)
    with InputHasher(found.base, found.experts) as ingredients:
        # These load transformers, which takes seconds.
        from neuromerge_hf.assembly.companions import write_companions
        from neuromerge_hf.model_cards import write_card
        from neuromerge_hf.planning.planner import plan_found

        make_plan = partial(
            plan_found,
            found,
            config=config or NeuroMergingConfig(),
            dtype=dtype,
            tokenizer=tokenizer,
            chat_template=chat_template,
            merge_heads=merge_heads,
            target=target,
            threads=threads,
            trust_remote_code=trust_remote_code,
        )
        plan = make_plan()
        assert compute_device is not None, "else there was a problem"
        if plan.bytes_to_download:
            found.fetch_weights()
            plan = make_plan()  # now from the files themselves
        started = time.perf_counter()
        with directory_in_the_making(target, overwrite) as folder:
            prepared = folder / "prepared"
            prepared.mkdir()
            for expert in plan.experts:
                if expert.preparation:
                    expert.preparation.run(prepared)
            method, diagnostics = _write_weights(plan, folder, max_shard_size, compute_device, plan.threads)
            seconds = time.perf_counter() - started
            shutil.rmtree(prepared)
            write_companions(plan, folder, trust_remote_code)
            for expert in plan.experts:
                if expert.head:
                    expert.head.save(folder / HEADS / expert.name)
            Recipe(
                ingredients.base,
                ingredients.models,
                plan.config,
                dtype=plan.dtype,
                tokenizer=tokenizer,
                chat_template=chat_template,
                merge_heads=merge_heads,
                max_shard_size=max_shard_size,
                tuned_on=tuned_on,
            ).save(folder)
            report = make_report(plan, method, diagnostics, target, seconds, compute_device, tuned_on)
            report.save(folder)
            write_card(folder, name=target.name)
    return report


def merge_recipe(
    path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Make a model again from the recipe that its merge wrote; see `merge` for the arguments.

    Raises:
        MergeError: if an input is not the one that the recipe was made with.
    """
    recipe = load_recipe(Path(path))
    recipe.check_files()
    return merge(
        [model.reference for model in recipe.models],
        output_dir,
        base_model=recipe.base_model.reference,
        config=recipe.config,
        dtype=recipe.dtype,
        tokenizer=recipe.tokenizer,
        chat_template=recipe.chat_template,
        merge_heads=recipe.merge_heads,
        max_shard_size=recipe.max_shard_size,
        tuned_on=recipe.tuned_on,
        device=device,
        threads=threads,
        overwrite=overwrite,
        token=token,
        trust_remote_code=trust_remote_code,
    )


def _write_weights(
    plan: MergePlan, folder: Path, max_shard_size: str | int, device: torch.device, threads: int
) -> tuple[Method[Any], Diagnostics | None]:
    with tqdm(total=plan.bytes_read, desc="Merging", unit="B", unit_scale=True, name="neuromerge_hf.merging") as bar:
        method = fit_method(plan, device, threads, bar.update)
        writer = CheckpointWriter(folder, plan.units, max_shard_size)
        record = StatisticsCollector(plan)
        try:
            merge_weights(plan, method, writer, device, threads, bar.update, record.add)
        finally:
            writer.close()
    return method, record.diagnostics(method.trimmings) if isinstance(method, NeuroMerging) else None
