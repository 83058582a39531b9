"""``neuromerge cache ls`` and ``neuromerge cache rm``."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from neuromerge_hf.cli.options import JSON
from neuromerge_hf.errors import MergeError

app = typer.Typer(no_args_is_help=True, help="List and delete the finished merges that AutoMergedModel keeps.")

Folder = Annotated[
    Path | None,
    typer.Option("--merge-cache-dir", help="The folder of the cache.", show_default="neuromerge in HF_HOME"),
]


@app.command("ls")
def list_command(merge_cache_dir: Folder = None, as_json: JSON = False) -> None:
    """List the finished merges, the newest first."""
    from neuromerge_hf.folder.merge_cache import list_merges
    from neuromerge_hf.text import aligned, readable_size

    cache = _cache(merge_cache_dir)
    found = list_merges(cache)
    if as_json:
        entries = [{**vars(each), "folder": str(each.folder)} for each in found]
        typer.echo(json.dumps(entries, indent=2, ensure_ascii=False))
        return
    if not found:
        typer.echo(f"There are no merges in {cache}")
        return
    rows = [["id", "size", "made", "merge"]]
    for each in found:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.made))
        rows.append([each.id[:12], readable_size(each.size), made, each.description])
    typer.echo("\n".join(aligned(rows)))
    typer.echo(f"\n{len(found)} in {cache}, {readable_size(sum(each.size for each in found))}. To delete:")
    typer.echo("  neuromerge cache rm ID ...\n  neuromerge cache rm --all")


@app.command("rm")
def delete_command(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Which to delete.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete all finished merges.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    merge_cache_dir: Folder = None,
) -> None:
    """Delete finished merges. They are made again when they are needed."""
    from neuromerge_hf.folder.merge_cache import delete_merges, list_merges
    from neuromerge_hf.text import readable_size

    if bool(ids) == everything:
        raise typer.BadParameter("Name the merges to delete, or say --all, and not both.")
    cache = _cache(merge_cache_dir)
    found = list_merges(cache)
    chosen = [each.id for each in found] if everything else ids or []
    freed = sum(each.size for each in found if any(each.id.startswith(name) for name in chosen))
    if not (yes or not chosen or typer.confirm(f"Delete {len(chosen)} of {len(found)} merges in {cache}?")):
        raise MergeError("Nothing was deleted.")
    deleted = delete_merges(cache, chosen)
    typer.echo(f"Deleted {len(deleted)} of {len(found)} merges, {readable_size(freed)}")


def _cache(folder: Path | None) -> Path:
    from neuromerge_hf.storage.paths import user_cache, user_path

    return user_path(folder, "merge_cache_dir") if folder else user_cache()
