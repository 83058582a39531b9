"""Which layer of the model a parameter belongs to, told from its name."""

from collections.abc import Iterable

EMBEDDINGS = ("embed", "wte", "wpe", "shared", "patch", "stem")
"""Names of modules that come before a model's blocks hold one of these; all others come after them."""


def find_layers(parameters: Iterable[str]) -> dict[str, str]:
    """The layer of each parameter, in the order of the layers.

    Modules in a list are named by their place in it, and the outermost list is that of the model's blocks:
    ``model.layers.3.mlp.up_proj.weight`` belongs to ``model.layers.3``. A parameter outside of every list belongs to
    the part of the model beside them, such as ``model.embed_tokens`` or ``lm_head``.
    """
    paths = {parameter: parameter.split(".") for parameter in parameters}
    lists = {tuple(path[: _number(path)]) for path in paths.values() if _number(path)}
    parts = {name for blocks in lists for name in _prefixes(blocks)}
    found = {}
    for parameter, path in paths.items():
        end = _number(path) or next((i for i in range(len(path)) if tuple(path[: i + 1]) not in parts), len(path) - 1)
        found[parameter] = ".".join(path[: end + 1])
    return dict(sorted(found.items(), key=lambda item: _place(item[1])))


def _number(path: list[str]) -> int:
    """Where in a path the first number is; 0 if there is none."""
    return next((i for i, name in enumerate(path) if name.isdecimal()), 0)


def _prefixes(path: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [path[:end] for end in range(1, len(path) + 1)]


def _place(layer: str) -> tuple[int, bool, str, int]:
    """What layers are sorted by: embeddings, blocks (a decoder's last) by their number, everything else."""
    blocks, _, number = layer.rpartition(".")
    if number.isdecimal():
        return 1, "decoder" in blocks, blocks, int(number)
    return 0 if any(name in layer for name in EMBEDDINGS) else 2, False, layer, 0
