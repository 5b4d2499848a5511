"""Text of any kind as Markdown, LaTeX, plotly and a terminal show it; HTML is escaped by markupsafe.

>>> print(escape_markdown("a|b *c* my_name"), escape_latex("5 % ± ε_1"))
a\\|b \\*c\\* my_name 5 \\% $\\pm$ $\\varepsilon$\\_1
"""

import html
import re

# Whatever GitHub would read as markup. Underscores within words are none, and stay as they are.
_MARKDOWN = re.compile(r"[\\|`*<~]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[])|&(?=#?\w+;)")
_MATH = {
    "×": r"\times", "±": r"\pm", "−": "-", "·": r"\cdot", "√": r"\surd", "≤": r"\leq", "≥": r"\geq", "≈": r"\approx",
    "→": r"\rightarrow", "∞": r"\infty", "★": r"\star", "<": "<", ">": ">", "|": "|", "²": "^2", "³": "^3",
    "α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "δ": r"\delta", "ε": r"\varepsilon", "λ": r"\lambda", "μ": r"\mu",
    "µ": r"\mu", "ρ": r"\rho", "σ": r"\sigma",
}  # fmt: skip
_LATEX = {symbol: f"${command}$" for symbol, command in _MATH.items()} | {c: rf"\{c}" for c in "&%$#_{}"}
_LATEX |= {"–": "--", "…": r"\dots{}", "~": r"\textasciitilde{}", "^": r"\^{}", "\\": r"\textbackslash{}"}


def printable(text: str) -> str:
    """Return text without control characters: names come from files, and must not steer a terminal or TeX."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def escape_markdown(text: str) -> str:
    """Return text that GitHub's Markdown shows as it is, in a table's cell too."""
    return _MARKDOWN.sub(lambda match: "\\" + match[0], printable(text)).replace("\n", "<br>")


def _latex_symbol(match: re.Match[str]) -> str:
    letter, after = match[0], match.string[match.end() : match.end() + 1]
    is_joined = letter in "-–" and after in ("-", "–")  # LaTeX makes one dash of hyphens beside each other
    return _LATEX.get(letter, letter) + ("{}" if is_joined else "")


def escape_latex(text: str) -> str:
    """Return text that LaTeX sets as it is, lines one above the other."""
    lines = [re.sub(".", _latex_symbol, line) for line in printable(text).split("\n")]
    return lines[0] if len(lines) == 1 else r"\shortstack{" + r" \\ ".join(lines) + "}"


def escape_plotly(text: str) -> str:
    """Return text that a plotly label shows as it is: a few tags are markup there."""
    return html.escape(text, quote=False)
