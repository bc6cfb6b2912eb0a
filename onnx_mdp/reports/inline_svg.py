"""An SVG document as a part of an HTML page: no namespaces, no metadata, no names that another figure has."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

__all__ = ["inline_svg"]

_REFERENCE = re.compile(r"url\(#([^)]*)\)")
_DROPPED = ("metadata", "style")


def inline_svg(svg: str, prefix: str, label: str) -> str:
    """The SVG element of a document that matplotlib wrote; ``prefix`` is put before its identifiers."""
    root = ET.fromstring(svg)
    for element in root.iter():
        element.tag = _plain(element.tag)
        for child in [c for c in element if _plain(c.tag) in _DROPPED]:
            element.remove(child)
        element.attrib = {_plain(name): _own(name, value, prefix) for name, value in element.attrib.items()}
    root.attrib |= {"role": "img", "aria-label": label, "style": "stroke-linejoin:round"}
    return ET.tostring(root, encoding="unicode")


def _plain(name: str) -> str:
    return name.rpartition("}")[2]


def _own(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return prefix + value
    if _plain(name) == "href":
        return f"#{prefix}{value.removeprefix('#')}"
    return _REFERENCE.sub(rf"url(#{prefix}\1)", value)
