#!/usr/bin/env -S bash #
# Starts a command of rwkv_peft/cli: run.sh COMMAND ARGUMENTS... Every script of the user ends here.
# The Python is that of .venv if ./quickstart.sh or ./test.sh has made it, else the one that is active.
! grep -q $'\r$' -- "${BASH_SOURCE[0]:-}" 2>/dev/null || { printf "%s has Windows line ends. Run: sed -i 's/\\\\r$//' -- %q\n" "$0" "$0" >&2; exit 2; } # Windows 换行
set -euo pipefail
root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python="$(command -v python3)" || { echo "There is no python3. Install Python 3.10 or newer." >&2; exit 2; }
export PATH="${python%/*}:$PATH" # ninja is there: torch builds DeepSpeed's optimizer with it
# Threads that wait for work spin a little, then sleep. Spinning for long, libgomp's default, is a disaster where another
# program shares the cores; not spinning at all halves the speed of small steps where none does. Tokens/s of the quickstart's
# LoRA on 2 cores, alone and beside one busy process: no spin 960 and 1500, 5000 turns 2010 and 670, 20000 turns 2200 and 430.
[ -n "${OMP_WAIT_POLICY:-}" ] || export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-5000}"
# Large tensors get memory of their own, in large pages, and give it back: batches of many sizes leave holes between them else,
# a fifth of a LoRA run's memory on a CPU. A full step of 0.1B takes 1.3 s instead of 1.7, a LoRA step the same time.
[ -n "${GLIBC_TUNABLES:-}" ] || export GLIBC_TUNABLES="glibc.malloc.mmap_threshold=4194304:glibc.malloc.hugetlb=1"
# notebooks export a picture backend of their own, and other launchers a rank: neither is meant for us (torchrun's is)
export MPLBACKEND=Agg
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}" # where a process dies, the others would print C++ stacks
[ -n "${TORCHELASTIC_RUN_ID:-}" ] || unset LOCAL_RANK
exec "$python" "$root/rwkv_peft/cli/run.py" "$@"
