"""Makes a family of models for the benchmarks: a base of Llama's architecture with random weights, and its experts.

    python benchmarks/families.py FOLDER --layers 22 --experts 3            # 1.1 B parameters, full fine-tunes
    python benchmarks/families.py FOLDER --layers 22 --experts 8 --rank 16  # LoRA adapters

It writes FOLDER/base and FOLDER/expert-1, expert-2, ... block by block, so that any size needs little memory.
"""

import argparse
import json
import struct
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BLOCK = 1 << 24


def make_family(
    folder: Path,
    layers: int = 22,
    experts: int = 3,
    rank: int | None = None,
    hidden: int = 2048,
    intermediate: int = 5632,
    vocabulary: int = 32000,
) -> None:
    """Write the models of the family that are missing.

    Weights are bfloat16. An expert's changes are a twentieth of the size of the base's weights.
    """
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=vocabulary,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    if not (folder / "base" / "config.json").exists():
        _write(folder / "base", shapes, seed=0)
        config.save_pretrained(folder / "base")
    for expert in range(1, experts + 1):
        target = folder / f"expert-{expert}"
        if rank is None and not (target / "config.json").exists():
            _write(target, shapes, seed=expert, base=folder / "base" / "model.safetensors")
            config.save_pretrained(target)
        elif rank is not None and not (target / "adapter_config.json").exists():
            _write_adapter(target, shapes, rank, seed=expert, base=folder / "base")


def _write(folder: Path, shapes: dict[str, tuple[int, ...]], seed: int, base: Path | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(shapes):
        size = 2 * torch.Size(shapes[name]).numel()
        header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    generator = torch.Generator().manual_seed(seed)
    with (folder / "model.safetensors").open("wb") as file:
        source = base.open("rb") if base else None
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        if source:
            source.seek(8 + len(encoded))
        for name in sorted(shapes):
            entries = torch.Size(shapes[name]).numel()
            for start in range(0, entries, BLOCK):
                values = torch.randn(min(BLOCK, entries - start), generator=generator)
                if source:
                    weights = torch.frombuffer(bytearray(source.read(2 * values.numel())), dtype=torch.bfloat16)
                    values = weights.float() + 1e-3 * values
                else:
                    values = 1 + 0.02 * values if len(shapes[name]) == 1 else 0.02 * values
                file.write(values.bfloat16().view(torch.uint8).numpy().data)


def _write_adapter(folder: Path, shapes: dict[str, tuple[int, ...]], rank: int, seed: int, base: Path) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if "_proj." in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, shape[1], generator=generator) / rank**0.5
            tensors[f"{module}.lora_B.weight"] = 1e-3 * torch.randn(shape[0], rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-2] for name in shapes if "_proj." in name})
    LoraConfig(
        r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM", base_model_name_or_path=str(base)
    ).save_pretrained(str(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=22, help="22 give 1.1 B parameters (%(default)s)")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--rank", type=int, help="make LoRA adapters of this rank instead of full fine-tunes")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32000)
    make_family(**vars(parser.parse_args()))
