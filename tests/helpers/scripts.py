"""What bash makes of the variables of a script."""

from __future__ import annotations

import subprocess
from pathlib import Path


def shell_values(path: Path) -> dict[str, str]:
    """What bash makes of the script's assignments, without running its last line."""
    text = path.read_text()
    body = text[text.index("set -a") : text.index("set +a")]
    done = subprocess.run(["bash", "-c", f"unset RUN\n{body}\nenv -0"], capture_output=True, text=True, check=True)
    return dict(item.split("=", 1) for item in done.stdout.split("\0") if "=" in item)
