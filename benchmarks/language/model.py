"""The base model, and how texts become tokens: those of the examples."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from chat_model import Batch, answer_logits, batches, collate, encode, load_tokenizer, save_base

__all__ = ["Batch", "answer_logits", "batches", "collate", "encode", "load_tokenizer", "save_base"]
