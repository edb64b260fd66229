"""The built-in sources, by the name that `data.source` gives them; `data.files` needs no name.

A new source is one file in this folder and one line here. The configuration reads the names from this table;
`forge.data.sources.build` imports the class where it is used.
"""

from __future__ import annotations

SOURCES: dict[str, str] = {"python-stdlib": "forge.data.sources.stdlib:StdlibSource"}
"""Name to `module:Class` of a `Source` that is built with `text_key`."""
