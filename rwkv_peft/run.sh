#!/usr/bin/env bash
# Starts one of the kit's Python modules: run.sh MODULE ARGUMENTS... Every script of the user ends here.
# The Python is that of .venv if ./quickstart.sh or ./test.sh has made it, else the one that is active.
set -euo pipefail
root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python="$(command -v python3)" || { echo "There is no python3. Install Python 3.10 or newer." >&2; exit 2; }
# idle threads sleep instead of spinning: where another program shares the cores, spinning makes small steps several times
# slower (measured: 36 s against 10 s for the same run beside one busy process; alone there is hardly a difference)
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
exec "$python" "$root/rwkv_peft/run.py" "$@"
