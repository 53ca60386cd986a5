"""A page of figures as one self-contained HTML file.

Figures are embedded as images, there are no scripts, and its style works on a phone and on paper.
"""

from __future__ import annotations

import base64
import html
from typing import Any

from olmoe.analysis.drawing import image_bytes

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 52rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
figure { margin: 0; } img { width: 100%; height: auto; display: block; }
.table { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid #ccc; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
code { background: #f0f0f0; border-radius: 3px; padding: 0 .2rem; white-space: pre-wrap; }
small { color: #555; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; } section, tr { break-inside: avoid; } }
"""


def document(title: str, body: str, reload: float | None = None) -> str:
    """A page with this title above a body of HTML; a browser reloads it every `reload` seconds."""
    again = "" if reload is None else f'<meta http-equiv="refresh" content="{reload:g}">\n'
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{again}'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}</main>\n</body>\n</html>\n"
    )


def section(name: str, title: str, figure: Any, sentence: str) -> str:
    """A figure under its title, with a sentence below."""
    image = base64.b64encode(image_bytes(figure, "svg")).decode()
    return (
        f'<section id="{name}">\n<h2>{html.escape(title)}</h2>\n<figure>\n'
        f'<img src="data:image/svg+xml;base64,{image}" alt="{html.escape(title)}">\n'
        f"<figcaption>{html.escape(sentence)}</figcaption>\n</figure>\n</section>\n"
    )
