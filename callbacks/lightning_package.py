"""Lightning's classes, from whichever of its two packages is installed.

Each package has classes of its own, but its trainer accepts any callback with the right methods.
"""

try:
    from lightning.pytorch import Callback as Callback
    from lightning.pytorch.loggers.logger import DummyLogger as DummyLogger
except ImportError:
    try:
        from pytorch_lightning import Callback as Callback  # type: ignore[assignment]
        from pytorch_lightning.loggers.logger import DummyLogger as DummyLogger  # type: ignore[assignment]
    except ImportError as error:
        raise ImportError(
            "neuromerge_hf.callbacks.lightning needs Lightning: pip install lightning (or pytorch-lightning)"
        ) from error
