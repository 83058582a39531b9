"""Results change the text of a card and not its picture, which shows the merge."""

from neuromerge_hf import add_results


def test_results_do_not_draw_the_picture_again(merged):
    picture, card = merged / "neuromerge.png", merged / "README.md"
    before, text = picture.stat(), card.read_text()
    add_results(merged, [{"model": "merged", "task": "sums", "metric": "accuracy", "value": 0.9}])
    assert card.read_text() != text
    assert (picture.stat().st_ino, picture.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    picture.unlink()
    add_results(merged, [{"model": "merged", "task": "sums", "metric": "accuracy", "value": 0.8}])
    assert picture.is_file()
