"""Numbers and token texts as they appear on the page."""

import math

import pytest

from crosscoder_jax.report import numbers
from crosscoder_jax.report.text import hover_safe, json_for_script, quoted, visible


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.853, "85.3 %"),
        (0.04, "4.0 %"),
        (0.0049, "0.49 %"),
        (0.9996, "> 99.9 %"),  # never rounded up to all of them
        (0.000004, "< 0.001 %"),  # never rounded down to none
        (-0.2, "\N{MINUS SIGN}20.0 %"),  # variance explained can be negative
    ],
)
def test_share(value, text):
    assert numbers.share(value).text == text


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_not_a_number_says_why(value):
    reason = "too little evidence"
    for write in (numbers.share, numbers.count):
        assert write(value, reason) == numbers.Figure("n/a", reason)
    for write in (numbers.decimal, numbers.significant):
        assert write(value, reason=reason) == numbers.Figure("n/a", reason)
    assert numbers.interval(value, 0.1, reason=reason) == numbers.Figure("n/a", reason)


def test_interval_is_written_with_its_half_width():
    assert numbers.interval(0.123, 0.098).text == "0.12 ± 0.10"
    assert numbers.interval(0.5, 0.0002).text == "0.50 ± <\N{NO-BREAK SPACE}0.01"
    assert numbers.interval(-0.051, 0.098).text == "\N{MINUS SIGN}0.05 ± 0.10"
    unknown = numbers.interval(0.5, math.nan)
    assert unknown.text == "0.50 ± n/a"
    assert unknown.reason


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12.0, "12.0"),
        (0.5171, "0.517"),
        (1234.5, "1,234"),
        (0.0, "0.00"),
        (1.5e-7, "1.50e\N{MINUS SIGN}07"),
        (2e9, "2.00e+09"),
    ],
)
def test_significant(value, text):
    assert numbers.significant(value).text.replace("-", "\N{MINUS SIGN}") == text


def test_counts_decimals_and_plurals():
    assert numbers.count(4096).text == "4,096"
    assert numbers.decimal(-0.001).text == "0.00"  # no negative zero
    assert numbers.plural(1, "latent") == "1 latent"
    assert numbers.plural(2_048, "latent") == "2,048 latents"


def test_visible_marks_what_cannot_be_seen():
    assert visible("a\nb\tc\r") == "a⏎b⇥c␍"
    assert visible("\x00\x1b") == "␀␛"
    assert visible("\u202eevil\u2066") == "[U+202E]evil[U+2066]"
    assert visible("a\u200bb\u200dc\ufeff\u00ad") == "a[U+200B]b[U+200D]c[U+FEFF][U+00AD]"
    assert visible("\u2028\ud800") == "[U+2028][U+D800]"
    assert visible("é шалом שלום 鯨") == "é шалом שלום 鯨"


def test_quoted_names_blanks_and_shortens():
    assert quoted(" whale") == "“whale”"
    assert quoted("  ") == "(space)"
    assert quoted("") == "(empty token)"
    assert quoted("x" * 30) == "“" + "x" * 23 + "…”"


def test_json_for_script_is_the_same_json():
    import json

    text = json.dumps({"a": "</script><!--&\u2028"}, ensure_ascii=False)
    escaped = json_for_script(text)
    assert not set("<>&\u2028") & set(escaped)
    assert json.loads(escaped) == json.loads(text)


def test_hover_safe_leaves_no_markup_and_no_template():
    safe = hover_safe("<b onclick=x>%{customdata}</b>&")
    assert "<" not in safe
    assert "{" not in safe
