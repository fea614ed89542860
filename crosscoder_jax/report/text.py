"""Make the text of tokens visible and harmless.

Escaping for HTML is the template's work; this module deals with characters that survive escaping and still
change what a reader sees: line breaks, control characters, directional overrides, invisible joiners.
"""

import html
import unicodedata

_SYMBOLS = {"\n": "⏎", "\r": "␍", "\t": "⇥"}


def visible(text: str) -> str:
    r"""Show every character of a token: line breaks as a return sign, invisible ones by their code point.

    >>> visible("a\n\u202eb\u200b")
    'a⏎[U+202E]b[U+200B]'
    """
    return "".join(_visible_character(character) for character in text)


def quoted(text: str, limit: int = 24) -> str:
    """Show a token inside a sentence: visible, shortened, a blank one named.

    >>> quoted(" whale")
    '“whale”'
    """
    shown = visible(text).strip()
    if not shown:
        return "(empty token)" if not text else "(space)"
    return f"“{shown if len(shown) <= limit else shown[: limit - 1] + '…'}”"


def hover_safe(text: str) -> str:
    """Escape text for a plotly label, which reads a small dialect of HTML.

    >>> hover_safe("<b>%{x}")
    '&lt;b&gt;%&#123;x&#125;'
    """
    return html.escape(text).replace("{", "&#123;").replace("}", "&#125;")


def json_for_script(text: str) -> str:
    r"""Escape JSON so that no text in it can end or open a script element or comment.

    >>> json_for_script('["</script>"]')
    '["\\u003c/script\\u003e"]'
    """
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _visible_character(character: str) -> str:
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"):
        return f"[U+{code:04X}]"
    return character
