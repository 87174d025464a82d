#!/usr/bin/env bash
# Starts one of the kit's Python modules: run.sh MODULE ARGUMENTS... Every script of the user ends here.
# The Python is that of .venv if ./quickstart.sh or ./test.sh has made it, else the one that is active.
set -euo pipefail
root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python="$(command -v python3)" || { echo "There is no python3. Install Python 3.10 or newer." >&2; exit 2; }
exec "$python" "$root/rwkv_peft/run.py" "$@"
