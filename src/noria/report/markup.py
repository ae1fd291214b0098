"""Texts of anybody as parts of a page: escaped, cut, and without what steers or hides."""

import html

from noria.tools.text import printable, readable


def safe(text: object, most: int = 500) -> str:
    """A text on one line, in HTML or in a quoted attribute."""
    return html.escape(printable(_cut(str(text), most)))


def block(text: str, most: int, kind: str = "text") -> str:
    """A text with its own lines; its direction is its own too."""
    return f'<pre class="{kind}" dir="auto">{html.escape(readable(_cut(text, most)))}</pre>'


def details(summary: str, content: str, is_open: bool = False) -> str:
    """What opens at a touch; both parts are HTML."""
    return f"<details{' open' * is_open}><summary>{summary}</summary>{content}</details>"


def table(rows: list[tuple[str, str]], most: int = 400) -> str:
    """Names and words, which are texts, of at most so many characters."""
    lines = (f'<tr><th scope="row">{safe(name, 200)}</th><td>{safe(words, most)}</td></tr>' for name, words in rows)
    return f'<table class="names">{"".join(lines)}</table>'


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} [... {len(text) - most:,} characters more]"
