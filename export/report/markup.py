"""Build HTML and SVG as text. Everything that is not ``Markup`` is escaped, so names cannot inject markup."""

import html

_EMPTY = ("meta",)  # elements without an end tag


class Markup(str):
    """Text that is already markup. Any other text is escaped when it is inserted into an element."""

    __slots__ = ()


def element(name: str, /, *content: str, **attributes: str | float) -> Markup:
    """Build an element with its content.

    Args:
        name: Name of the element, such as ``table``.
        content: Markup stays as it is, other text is escaped.
        attributes: Underscores in names become hyphens, and an underscore at the end is removed: ``stroke_width``,
            ``class_``. Numbers are rounded to two places, which is far below a pixel.
    """
    given = "".join(f' {_hyphened(key)}="{_value(value)}"' for key, value in attributes.items())
    if name in _EMPTY:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{joined(*content)}</{name}>")


def joined(*content: str) -> Markup:
    """Concatenate pieces of markup and text."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part, quote=False) for part in content))


def _hyphened(key: str) -> str:
    return key.removesuffix("_").replace("_", "-")


def _value(value: str | float) -> str:
    return html.escape(value) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
