"""Follow, read and stop runs, wherever they run: on this machine, or mirrored from a cluster."""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path

from forge.cluster.registry import find_known
from forge.errors import ForgeError
from forge.process import first_line
from forge.remote.mirror import ask, find_run_handle, find_stoppable, stop_text
from forge.runs.logs import LogTail, log_names
from forge.runs.remote_ref import RemoteRef, read_remote_ref
from forge.runtime.driver_process import RunHandle
from forge.ui.run_list import RunList

_MAX_FOLLOWED = 32
_ASK_EVERY_S = 5.0
_STATUS_EVERY_S = 60.0
_REMOTE_LOGS = ("rank-0", "driver", "recorder")


class RemoteRuns:
    """The runs on clusters whose records are being copied into their folders here."""

    def __init__(self) -> None:
        self._handles: dict[Path, RunHandle] = {}
        self._messages: dict[Path, str] = {}
        self._note = ""
        self._asked_at = -_STATUS_EVERY_S
        self._lock = threading.Lock()

    def follow_running(self, runs: RunList) -> None:
        """Follow the running runs of the list of a cluster; others are followed while their page is shown."""
        if runs.cluster is not None:
            for row in runs.rows():
                if row.status == "running":
                    self.follow(row.folder)

    def follow(self, folder: Path) -> None:
        """Copy the records of a run on a cluster while it is running; of others there is nothing to copy."""
        with self._lock:
            known = self._handles.get(folder)
            if known is not None and known.is_alive():
                return
            self._handles.pop(folder, None)
            ref = read_remote_ref(folder)
            if ref is None or not ref.job or len(self._handles) >= _MAX_FOLLOWED:
                return
            try:
                handle = find_run_handle(folder)
            except ForgeError as error:
                self._messages[folder] = first_line(error)
                return
            if handle is not None:
                self._handles[folder] = handle

    def note_on(self, runs: RunList) -> str:
        """Say which runs a cluster has that were started from other machines; it is asked once a minute."""
        if runs.cluster is not None and time.monotonic() - self._asked_at >= _STATUS_EVERY_S:
            self._asked_at = time.monotonic()
            threading.Thread(target=self._ask_for_others, args=(runs,), daemon=True).start()
        return self._note

    def _ask_for_others(self, runs: RunList) -> None:
        assert runs.cluster is not None
        try:
            found = find_known(runs.cluster).status().runs
        except ForgeError as error:
            self._note = f"the cluster '{runs.cluster}' cannot be reached: {first_line(error)}"
            return
        known = {row.folder.name for row in runs.rows()}
        others = sorted(name for name in found if name not in known)
        self._note = f"started from other machines, and shown there alone: {', '.join(others)}" if others else ""

    def messages(self, folder: Path) -> str:
        """Return what was last said about the connection to a run's cluster; empty if it is reached."""
        handle = self._handles.get(folder)
        for text in handle.connection_messages() if handle is not None else ():
            self._messages[folder] = text
        return self._messages.get(folder, "")

    def handle_of(self, folder: Path) -> RunHandle | None:
        """Return a handle to a running run that can be stopped. Raises: as `find_stoppable`."""
        known = self._handles.get(folder)
        return known if known is not None and known.is_alive() else find_stoppable(folder)

    def log_names(self, folder: Path) -> list[str]:
        """Return the names of a run's logs; those on a cluster cannot be listed, only the usual ones."""
        ref = read_remote_ref(folder)
        names = log_names(folder)
        return names if ref is None else list(dict.fromkeys([*_REMOTE_LOGS, *names]))

    def log_of(self, folder: Path, *, name: str) -> RunLog:
        """Return the end of a log, here or on the cluster's head."""
        ref = read_remote_ref(folder)
        return LogTail(folder, name=name) if ref is None else RemoteTail(ref, name=name)


class RemoteTail:
    """Reads the end of a log on a cluster's head, then what is appended to it, on a thread of its own."""

    def __init__(self, ref: RemoteRef, *, name: str) -> None:
        self._ref, self._name = ref, name
        self._offset = -1
        self._texts: deque[str] = deque()
        self._asked_at = -_ASK_EVERY_S
        self._thread: threading.Thread | None = None

    def read(self) -> str:
        """Return what has arrived, and ask for more every few seconds."""
        is_asking = self._thread is not None and self._thread.is_alive()
        if not is_asking and time.monotonic() - self._asked_at >= _ASK_EVERY_S:
            self._asked_at = time.monotonic()
            self._thread = threading.Thread(target=self._ask, daemon=True)
            self._thread.start()
        texts = [self._texts.popleft() for _ in range(len(self._texts))]
        return "".join(texts)

    def _ask(self) -> None:
        try:
            cluster = find_known(self._ref.cluster)
            if self._offset < 0:
                _, self._offset = ask(cluster, "more", self._ref.folder, self._name, "-1")
                self._texts.append(ask(cluster, "log", self._ref.folder, self._name, "200"))
                return
            text, self._offset = ask(cluster, "more", self._ref.folder, self._name, str(self._offset))
            self._texts.append(text[-(2**16) :])
        except ForgeError as error:
            self._texts.append(f"[{first_line(error)}]\n")


RunLog = LogTail | RemoteTail


def stop_run(folder: Path, *, remote: RemoteRuns) -> str:
    """Ask a run, or all trials of a search, to checkpoint and stop, as `forge runs stop` does.

    Returns: what happens now.
    Raises: as `find_stoppable`.
    """
    handle = remote.handle_of(folder)
    if handle is None:
        return f"{folder.name} is not running"
    handle.request_stop()
    return stop_text(folder)
