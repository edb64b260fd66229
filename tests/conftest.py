"""What holds for every test."""

from __future__ import annotations

import signal

# CI, nohup and `&` start their children with Ctrl-C ignored, and the ignorance is inherited; the tests that
# press it need processes that listen. A handler, unlike ignorance, is not passed on: they get the default.
signal.signal(signal.SIGINT, signal.default_int_handler)
