"""Makes the tables and the picture from the scores in results/quality.json.gz, and prints the tables.

python benchmarks/quality/summary.py
"""

from pathlib import Path

from figures import FIGURES, RESULTS, Scores
from picture import draw
from tables import tables


def write_summary(folder: Path) -> None:
    """Write tables.md and quality.png beside quality.json.gz in a folder, and print the tables."""
    scores = Scores.load(folder / FIGURES)
    text = tables(scores)
    (folder / "tables.md").write_text(text)
    draw(scores, folder / "quality.png")
    print(text)


if __name__ == "__main__":
    write_summary(RESULTS)
