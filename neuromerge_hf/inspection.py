"""`inspect_models`: what each expert changed, and where the experts collide, with or without a merge."""

import dataclasses
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuromerge_hf.errors import MergeError, printable
from neuromerge_hf.folder.diagnostics import Diagnostics
from neuromerge_hf.folder.report import REPORT_NAME, load_report
from neuromerge_hf.folder.rounding import Rounding
from neuromerge_hf.model_cards.page import render_page
from neuromerge_hf.options import with_options
from neuromerge_hf.planning.preflight import check_settings
from neuromerge_hf.planning.resolve import resolve
from neuromerge_hf.spec import MergeSpec, ModelId, Models, Runtime, read_options
from neuromerge_hf.storage.paths import user_path
from neuromerge_hf.storage.writing import write_file
from neuromerge_hf.text import Summary, aligned, percent

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from neuromerge_hf.spec import MergeOptions

READS_ONCE = "average"
"""The method that the pass is planned for. No merge is made, and this one needs no other pass."""

SHOWN = 10
"""How many parameters a summary names."""


@dataclass(frozen=True, repr=False)
class Inspection(Summary):
    """What experts changed, and where they collide. `str` summarises it, and `save` writes an interactive page.

    Attributes:
        title: what was inspected.
        base: the name of the base.
        kinds: the kind of each expert ("full", or the adapter's), in the order of `diagnostics.experts`.
        diagnostics: the measurements.
        method: the method of the merge; None if nothing was merged.
        rounding: what rounding left of the merged change; None if nothing was merged or rounded.

    Examples:
        >>> inspect_models(["math", "code-lora"], base_model="base").save("page.html").name
        'page.html'
    """

    title: str
    base: str
    kinds: list[str]
    diagnostics: Diagnostics
    method: str | None = None
    rounding: Rounding | None = None

    def to_dict(self) -> dict[str, Any]:
        """The inspection as plain Python objects, for JSON."""
        return dataclasses.asdict(self)

    def to_html(self) -> str:
        """One page that needs nothing else: no other file, and no network."""
        facts = {"title": self.title, "base": self.base, "kinds": self.kinds, "method": self.method}
        return render_page(facts, self.diagnostics, self.rounding)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, and return its path."""
        target = user_path(path, "path")
        write_file(target, self.to_html())
        return target

    def __str__(self) -> str:
        found = self.diagnostics
        rows = [["expert", "kind", "change", "effective rank", "kept"]]
        for number, (kind, expert) in enumerate(zip(self.kinds, found.experts, strict=True)):
            ranks = [each.effective_ranks[number] for each in found.parameters if each.effective_ranks]
            known = [rank for rank in ranks if rank is not None]
            rows.append(
                [
                    expert.name,
                    kind,
                    "" if expert.relative_norm is None else percent(expert.relative_norm, 2),
                    f"{sum(known) / len(known):,.1f}" if known else "",
                    "" if expert.survival is None else percent(expert.survival),
                ]
            )
        lines = [f"{self.title}:", "", *(f"  {line}" for line in aligned(rows)), "", found.verdict]
        lines += [found.details] if found.details else []
        if found.colliding:
            table = [["", "found", "by chance"]]
            for each in found.colliding[:SHOWN]:
                shares = (each.conflicting_orthogonal or 0.0, each.conflicting_by_chance_orthogonal or 0.0)
                table.append([each.name, *(percent(share, 1) for share in shares)])
            lines += ["", "Signs conflict most, beyond chance, in", *(f"  {line}" for line in aligned(table))]
        return "\n".join(map(printable, lines))


@with_options(MergeSpec, Runtime, without=("config", "overwrite", "max_shard_size", "tuned_on"))
def inspect_models(models: Models | ModelId, **options: "Unpack[MergeOptions]") -> Inspection:
    """Inspect experts before a merge, or a finished merge.

    Args:
        models: the experts, as in `merge`: their weights are read once, and nothing is merged. Or the folder that a
            merge wrote: its report tells what the merge measured, and no weights are read.
        **options: the fields of `MergeSpec` and `Runtime`, for experts.

    Returns:
        For each expert, layer and parameter: the relative change, the cosines between the experts and the share of the
        energy in which their signs conflict, beside that by chance. For experts also the effective rank of each change,
        and the neurons that collide most; for a merge how much it holds of each expert.

    Raises:
        MergeError: if the experts cannot be merged, or the folder was not written by a merge that measured them.

    Examples:
        >>> found = inspect_models(["math", "code-lora"], base_model="base")
        >>> [expert.name for expert in found.diagnostics.experts]
        ['math', 'code-lora']
    """
    if isinstance(models, str | os.PathLike):
        if options:
            raise TypeError(f"A merged model has all settings itself: leave {', '.join(options)} out.")
        return _of_merge(user_path(models, "models"))
    spec, runtime = read_options("inspect_models", models, {**options, "config": READS_ONCE})
    return _of_experts(spec, runtime)


def _of_merge(folder: Path) -> Inspection:
    report = load_report(folder)
    base, *names = report.model_names
    title = f"The merge of {', '.join(names)} into {base}"
    found = report.diagnostics
    if found is None:
        raise MergeError(
            f"{folder / REPORT_NAME} has no measurements: an earlier version wrote it. Inspect the experts themselves, "
            "or merge again."
        )
    return Inspection(title, base, [expert.kind for expert in report.experts], found, report.method, report.rounding)


def _of_experts(spec: MergeSpec, runtime: Runtime) -> Inspection:
    problems = check_settings(spec, runtime)
    resolved = resolve(spec, runtime.access, problems)
    # Imported here, because loading torch and transformers takes seconds, in which many problems are found already.
    from huggingface_hub.utils.tqdm import tqdm

    from neuromerge_hf.assembly.assemble import compute_adapters
    from neuromerge_hf.engine.cpu_kernel import find_kernel
    from neuromerge_hf.engine.device import find_device
    from neuromerge_hf.engine.inspection import inspect_units
    from neuromerge_hf.engine.passes import Passes
    from neuromerge_hf.folder.directory import work_folder
    from neuromerge_hf.folder.inputs import unchanged_inputs
    from neuromerge_hf.planning.planner import plan_with_weights

    plan, device = plan_with_weights(spec, runtime, resolved), find_device(runtime.device)
    total = sum(unit.bytes_read for unit in plan.work.merged)
    bar = tqdm(total=total, desc="Inspecting", unit="B", unit_scale=True, name="neuromerge_hf.inspecting")
    with work_folder(Path(tempfile.gettempdir())) as folder, unchanged_inputs(plan.locations), bar:
        compute_adapters(plan, folder / "computed")
        kernel = find_kernel(device, plan.units)
        found = inspect_units(Passes(plan.work, device, plan.threads, bar.update, kernel=kernel))
    base, names = plan.base.location.name, [expert.name for expert in plan.experts]
    kinds = [expert.kind for expert in plan.experts]
    return Inspection(f"What {', '.join(names)} changed of {base}", base, kinds, found)
