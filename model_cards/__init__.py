"""The model card of a merge. `MergeCard` collects its content from a merged model's folder; `write_card` writes it."""

from neuromerge_hf.model_cards.card import MergeCard
from neuromerge_hf.model_cards.write import hand_written, write_card

__all__ = ["MergeCard", "hand_written", "write_card"]
