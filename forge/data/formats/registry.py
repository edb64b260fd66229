"""The built-in formats, by the name that `data.format` gives them.

A new format is one file in this folder and one line here. The configuration reads the names from this table;
`forge.data.formats.build` imports the class where it is used.
"""

from __future__ import annotations

FORMATS: dict[str, str] = {
    "text": "forge.data.formats.text:TextFormat",
    "chat": "forge.data.formats.chat:ChatFormat",
    "preference": "forge.data.formats.preference:PreferenceFormat",
    "labelled": "forge.data.formats.labelled:LabelledFormat",
    "pair": "forge.data.formats.pair:PairFormat",
    "embedding": "forge.data.formats.embedding:EmbeddingFormat",
}
"""Name to `module:Class` of an `ExampleFormat`."""

PART_NAMES: dict[str, dict[int, str]] = {
    "pair": {1: "source", 2: "target"},
    "text": {1: "source", 2: "target"},  # what span corruption makes of it
    "labelled": {1: "text", 2: "pair"},
    "preference": {1: "chosen", 2: "rejected"},
    "embedding": {1: "query", 2: "positive", 3: "negative"},
}
"""What the plan calls the values of the array `part`, of formats whose examples have several parts."""

TEMPLATE_FORMATS = ("chat", "preference")
"""Formats that render a chat template, which `data.chat.template` may give."""
