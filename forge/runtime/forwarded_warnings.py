"""Send the warnings of forge's own code from a process without a terminal to the one that has it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from forge.errors import ForgeWarning


def forward_warnings(say: Callable[[str], None]) -> None:
    """Call `say` with every `ForgeWarning` of this process, which else goes to stderr as other warnings do."""
    show = warnings.showwarning

    def showwarning(message: Warning | str, category: type[Warning], *place: Any, **named: Any) -> None:
        if issubclass(category, ForgeWarning):
            say(str(message))
        else:
            show(message, category, *place, **named)

    warnings.simplefilter("always", ForgeWarning)
    warnings.showwarning = showwarning
