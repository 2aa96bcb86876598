"""The formulas of docstrings as HTML: italic variables, sub- and superscripts, roots."""

import re
from html import escape

FUNCTIONS = {
    *("blockdiag", "clamp", "cos", "diag", "elu", "exp", "ifft2", "mod", "orth", "rank", "Re"),
    *("relu", "sin", "tanh"),
}
POWERS = dict(zip("⁰¹²³⁻ᵀ½", "0123−T½", strict=True))
SYMBOLS = {"->": "→", "-": "−", "...": "…", "*": "·", "'": "′"}

LETTER = r"[^\W\d_⁰¹²³ᵀ½]"
TOKEN = re.compile(
    rf"""
    (?P<gap>\ {{3,}})
  | ``(?P<code>[^`]+)``
  | (?P<power>[⁰¹²³⁻ᵀ½]+)
  | _(?P<low>\{{[^}}]*\}}|\([^)]*\)|{LETTER}+|\d)
  | √(?P<root>\((?:[^()]|\([^()]*\))*\)|{LETTER}(?:_{LETTER}+)?)
  | (?P<indexed>{LETTER})(?P<index>\d)(?!\w)
  | (?P<name>{LETTER}{{2,}}_{LETTER}+)
  | (?P<word>{LETTER}{{2,}}(?:-{LETTER}{{2,}}|'s\b|2\b)?)
  | (?P<letter>{LETTER}\u0302?)
  | (?P<number>\d+(?:e-\d+)?)
  | (?P<symbol>->|\.\.\.|[-*'])
  | (?P<other>.)
    """,
    re.VERBOSE,
)


def formula(text: str) -> str:
    """Write one line of a formula as HTML.

    Args:
        text: The line as it stands in a docstring, such as ``W' = W + s B A,   s = alpha / r``.

    Returns:
        Inline HTML.
    """
    return "".join(_shown(found) for found in TOKEN.finditer(text.strip()))


def _shown(found: re.Match[str]) -> str:
    kind, text = found.lastgroup, found.group()
    match kind:
        case "gap":
            return '<span class="gap"> </span>'
        case "code" | "name":
            return f"<code>{found[kind]}</code>"
        case "power":
            return f"<sup>{''.join(POWERS[mark] for mark in text)}</sup>"
        case "low":
            inside = found["low"].strip("{}()")
            is_word = inside.isalpha() and len(inside) > 1
            return f"<sub>{inside if is_word else formula(inside)}</sub>"
        case "root":
            inside = found["root"].removeprefix("(").removesuffix(")")
            return f'√<span class="root">{formula(inside)}</span>'
        case "index":
            return f"<var>{found['indexed']}</var><sub>{found['index']}</sub>"
        case "word":
            return f'<span class="{"function" if text in FUNCTIONS else "prose"}">{text}</span>'
        case "letter":
            return f"<var>{text}</var>"
        case "symbol":
            return SYMBOLS[text]
    return escape(text)
