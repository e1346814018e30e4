"""Docstrings for the site: roles of Sphinx (``:class:`mmc_fast.x.Y```) become links of mkdocs."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

import mmc_fast

PUBLIC = {f"mmc_fast.{name}": f"{module}.{name}" for name, module in mmc_fast._LAZY.items()}
"""The short names of the package -> where they are defined, which is where the site has them."""
PUBLIC |= {f"mmc_fast.{name}": f"mmc_fast.{name}.{name}" for name in ("agop", "diagnose")}

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(~?)([\w.]+)`")


def with_links(text: str) -> str:
    """A role of a name of this package becomes a link to it, any other role the name alone."""

    def link(match: re.Match[str]) -> str:
        short, name = match[1], match[2]
        shown = name.rpartition(".")[2] if short else name
        target = PUBLIC.get(name, name)
        inside = target.startswith("mmc_fast.") and match[0][1:4] != "mod"
        return f"[`{shown}`][{target}]" if inside else f"`{shown}`"

    return ROLE.sub(link, text)


class Roles(Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_links(obj.docstring.value)
