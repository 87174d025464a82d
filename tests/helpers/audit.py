"""The names that this process writes to, makes, cuts, links or removes: reported by Python's audit events, as strace would report
them. (Native writers, the programs that trackers start, are not seen: by strace on 2026-11-30, only wandb has such.)"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# audit event -> (place of a name, place of the number of the folder that it is in) among what is reported
EVENTS = {
    "os.rename": ((0, 2), (1, 3)), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),), "os.link": ((1, 3),),
    "os.symlink": ((1, 2),), "os.truncate": ((0, None),), "os.chmod": ((0, 2),), "os.utime": ((0, 3),),
}  # fmt: skip
VARYING = (
    (r"\.tmp-\d+", ".tmp-PID"), (r"^output/\.latest-\d+$", "output/.latest-PID"),
    (r"find-lr-\d+-\d+", "find-lr-TIME"), (r"events\.out\.tfevents\..*", "events.out.tfevents.TIME.HOST.PID"),
    (r"offline-run-\d+_\d+-\w+", "offline-run-TIME-ID"), (r"wandb/(latest-run|debug.*\.log)\.\d+$", r"wandb/\1.PID"),
    (r"wandb/(.*)/run-\w+\.wandb$", r"wandb/\1/run-ID.wandb"),
)  # fmt: skip


def collect(root: Path, result: set[str]) -> None:
    """From now on, `found` gets every name below root that is written; for a process of its own: it cannot be undone."""
    root = root.resolve()

    def note(name, folder: int | None) -> None:
        if isinstance(name, int):
            return
        path = Path(os.fsdecode(name))
        if folder is not None and folder >= 0:
            path = Path(os.readlink(f"/proc/self/fd/{folder}")) / path
        path = path.absolute().parent.resolve() / path.name
        if path.is_relative_to(root):
            name = path.relative_to(root).as_posix()
            for pattern, word in VARYING:
                name = re.sub(pattern, word, name)
            result.add(name)

    def hear(event: str, reported: tuple) -> None:
        if event == "open":
            name, _, flags = reported
            if flags & CHANGES and flags & os.O_TMPFILE != os.O_TMPFILE:
                note(name, None)
        for name, folder in EVENTS.get(event, ()):
            note(reported[name], None if folder is None else reported[folder])

    sys.addaudithook(hear)
