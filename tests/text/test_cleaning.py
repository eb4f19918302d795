import pytest

from opensora.text.cleaning import clean_caption, clean_once, lower_caption


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A Red Ball", "a red ball"),
        ("see https://a.b.com/c and www.d.org", "see and"),
        ("<i>it</i> is&nbsp;&amp; was", "it is was"),
        ("漢字 “quoted” — dash", '"quoted" - dash'),
        ("DSC_0012.JPG a beach 1920x1080", "a beach"),
        ("buy now, free shipping!", "buy now, !"),
        ("a+b%20c", "a b c"),
        ("", ""),
        ("<", "<"),
    ],
)
def test_rules(caption: str, cleaned: str):
    assert clean_caption(caption) == cleaned


def test_escaped_html_needs_the_second_pass():
    assert clean_once("&lt;b&gt;bold&lt;/b&gt; move") == "<b>bold< b> move"
    assert clean_caption("&lt;tag&gt; escaped") == "escaped"


def test_scores_survive_cleaning():
    caption = "a cat. aesthetic score: 6.5. motion score: 4.0."
    assert clean_caption(caption) == caption
    assert lower_caption("  Kept: 100% ") == "kept: 100%"
