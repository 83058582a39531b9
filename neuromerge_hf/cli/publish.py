"""``neuromerge card`` and ``neuromerge push``."""

from pathlib import Path
from typing import Annotated

import typer

from neuromerge_hf.cli.options import Token


def card_command(
    folder: Annotated[Path, typer.Argument(help="The directory that a merge wrote.", show_default=False)],
    repo_id: Annotated[
        str | None, typer.Option(help="The repository that the card is for.", show_default="the folder itself")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="A JSON file with measurements to add: a list of {model, task, metric, value}.")
    ] = None,
    template: Annotated[Path | None, typer.Option(help="A Jinja template that replaces sections of the card.")] = None,
) -> None:
    """Write or refresh the model card of a merged model."""
    from neuromerge_hf.api import add_results
    from neuromerge_hf.folder.results import load_results
    from neuromerge_hf.model_cards import write_card

    if results:
        add_results(folder, load_results(results))
    typer.echo(f"The card is in {write_card(folder, repo_id, template=template)}")


def push_command(
    folder: Annotated[Path, typer.Argument(help="The output directory of a merge.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="The repository on the Hub, owner/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="The branch. It is made if it does not exist.", show_default="main")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="The first line of the commit's message.")] = None,
    commit_description: Annotated[str | None, typer.Option(help="The rest of the commit's message.")] = None,
    template: Annotated[Path | None, typer.Option(help="A Jinja template that replaces sections of the card.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="One more tag for the card. Repeatable.")] = None,
    token: Token = None,
) -> None:
    """Upload a merged model with its card, as one commit. Files that are there already are not sent again."""
    from neuromerge_hf.hub.push import push

    commit = push(
        folder,
        repo_id,
        private=private or None,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        commit_description=commit_description,
        template=template,
        tags=tag or (),
    )
    typer.echo(commit.pr_url or commit.commit_url)
