"""The layer of the model that a parameter belongs to, found from its name."""

from collections.abc import Iterable

EMBEDDINGS = ("embed", "wte", "wpe", "shared", "patch", "stem")
"""Parts of the names of modules that come before a model's blocks. All other modules come after the blocks."""


def find_layers(parameters: Iterable[str]) -> dict[str, str]:
    """The layer of each parameter, in the order of the layers.

    A list names its modules by number, and the outermost list holds the model's blocks:
    ``model.layers.3.mlp.up_proj.weight`` belongs to ``model.layers.3``. A parameter outside every list belongs to a
    module beside the blocks, such as ``model.embed_tokens`` or ``lm_head``.
    """
    paths = {parameter: parameter.split(".") for parameter in parameters}
    lists = {tuple(path[: _first_number(path)]) for path in paths.values() if _first_number(path)}
    parts = {name for blocks in lists for name in _prefixes(blocks)}
    found = {}
    for parameter, path in paths.items():
        outside = (i for i in range(len(path)) if tuple(path[: i + 1]) not in parts)
        end = _first_number(path) or next(outside, len(path) - 1)
        found[parameter] = ".".join(path[: end + 1])
    return dict(sorted(found.items(), key=lambda item: _sort_key(item[1])))


def _first_number(path: list[str]) -> int:
    """The position of the first number in a path; 0 if there is none."""
    return next((i for i, name in enumerate(path) if name.isdecimal()), 0)


def _prefixes(path: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [path[:end] for end in range(1, len(path) + 1)]


def _sort_key(layer: str) -> tuple[int, bool, str, int]:
    """The sort key of a layer: embeddings first, then blocks by number (a decoder's last), then all other layers."""
    blocks, _, number = layer.rpartition(".")
    if number.isdecimal():
        return 1, "decoder" in blocks, blocks, int(number)
    return 0 if any(name in layer for name in EMBEDDINGS) else 2, False, layer, 0
