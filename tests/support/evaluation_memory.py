"""Measures the memory that putting merged weights into a model takes. Prints the peak and the largest shard's size."""

import sys
import threading
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from neuromerge_hf import merge
from neuromerge_hf.callbacks.common.weights import merged_weights


def private_memory() -> int:
    """The memory of this process that is no page of a file, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8000, n_embd=256, n_layer=12, n_head=4, n_positions=64))
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)
    model.save_pretrained(folder / "expert")
    merge([folder / "expert"], folder / "merged", base_model=folder / "base", max_shard_size="10MB")
    before = peak = private_memory()
    stopped = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stopped.is_set():
            peak = max(peak, private_memory())
            time.sleep(0.0002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    weight = model.transformer.wte.weight
    trained = weight[0, 0].item()
    with merged_weights(model, folder / "merged", "expert"):
        assert weight[0, 0].item() != trained
    assert weight[0, 0].item() == trained
    stopped.set()
    watcher.join()
    print(peak - before, max(path.stat().st_size for path in (folder / "merged").glob("*.safetensors")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
