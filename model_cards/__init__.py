"""The model card of a merge: `MergeCard` brings together what a merged model's folder says, and renders it."""

from neuromerge_hf.model_cards.card import MergeCard
from neuromerge_hf.model_cards.write import hand_written, write_card

__all__ = ["MergeCard", "hand_written", "write_card"]
