"""What a location shows of itself."""

from neuromerge_hf.access import Access
from neuromerge_hf.storage.location import Location


def test_the_token_is_not_shown(tmp_path):
    assert "hf_secret" not in repr(Location("owner/name", tmp_path, commit="0" * 40, access=Access("hf_secret")))
