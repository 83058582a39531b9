"""What a card says of each method of merging: its name, where it is from, and what it does."""

from dataclasses import dataclass

from neuromerge_hf.config import NeuroMergingConfig


@dataclass(frozen=True)
class MethodText:
    """A method in words.

    Attributes:
        name: what it is called.
        url: of the paper.
        text: what it does, a few lines.
    """

    name: str
    url: str
    text: str

    @property
    def link(self) -> str:
        """Markdown."""
        return f"[{self.name}]({self.url})"


METHODS = {
    NeuroMergingConfig.method: MethodText(
        "NeuroMerging",
        "https://arxiv.org/abs/2503.05320",
        """\
NeuroMerging (Fang et al., EMNLP 2025) takes what each fine-tune changed in the base, its task vector, and keeps the
largest entries of it. A neuron's change is then split into a part parallel to the neuron's old weights and a part
orthogonal to them, and in each part a sign is elected where the fine-tunes disagree.""",
    ),
    "average": MethodText(
        "averaging",
        "https://arxiv.org/abs/2203.05482",
        "Every weight is the mean of the fine-tunes' weights.",
    ),
    "task_arithmetic": MethodText(
        "Task Arithmetic",
        "https://arxiv.org/abs/2212.04089",
        """\
Task Arithmetic (Ilharco et al., ICLR 2023) adds up what the fine-tunes changed in the base, their task vectors, and
gives the sum a weight.""",
    ),
    "ties": MethodText(
        "TIES-Merging",
        "https://arxiv.org/abs/2306.01708",
        """\
TIES-Merging (Yadav et al., NeurIPS 2023) takes what each fine-tune changed in the base, its task vector, and keeps the
largest entries of it. It elects a sign for each entry, and takes the mean over the fine-tunes that have it.""",
    ),
    "dare_ties": MethodText(
        "DARE and TIES-Merging",
        "https://arxiv.org/abs/2311.03099",
        """\
DARE (Yu et al., ICML 2024) drops entries at random of what each fine-tune changed in the base, its task vector, and
rescales the others. TIES-Merging (Yadav et al., NeurIPS 2023) then keeps the largest, elects a sign for each entry, and
takes the mean over the fine-tunes that have it.""",
    ),
    "pcb": MethodText(
        "PCB-Merging",
        "https://arxiv.org/abs/2410.02396",
        """\
PCB-Merging (Du et al., NeurIPS 2024) takes what each fine-tune changed in the base, its task vector, and scores each
entry by how large it is and how much the others agree. Entries of a low score are dropped; the scores weight the
others.""",
    ),
}
"""By the names of the methods."""
