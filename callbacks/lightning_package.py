"""Lightning, of whichever of its two packages is installed.

The packages have classes of their own, but their trainers ask for no more than the methods.
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
