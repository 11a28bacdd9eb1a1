"""Numbers with their nouns."""

from pab.core.counts import counted


def test_the_noun_agrees_with_the_number() -> None:
    assert [counted(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert counted(2, "query", "queries") == "2 queries"
    assert counted(1978, "image") == "1978 images"
    assert counted(1978, "image", spec=",") == "1,978 images"
