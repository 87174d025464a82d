#!/usr/bin/env -S bash #
# Makes .venv and installs what the kit needs; ./quickstart.sh and ./test.sh call it. The second time it costs nothing.
#   ./setup.sh                           requirements.txt                                        安装依赖到 .venv
#   ./setup.sh requirements-test.txt     and this as well
# If the Python that is active has torch 2.10 or newer (your CUDA build, say), that torch is used, not replaced.
[ -n "${BASH_VERSION:-}" ] || { echo "Run this with bash: bash $0" >&2; exit 2; } #
! grep -q $'\r$' -- "${BASH_SOURCE[0]:-}" 2>/dev/null || { printf "%s has Windows line ends. Run: sed -i 's/\\\\r$//' -- %q\n" "$0" "$0" >&2; exit 2; } # Windows 换行
set -euo pipefail
cd "$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

case "${1:-}" in -h | --help) sed -n '2,5s/^# //p' "$0"; exit 0 ;; esac
say() { printf '%s\n' "$*" >&2; }

python="$(command -v python3)" || { say "There is no python3. Install Python 3.10 or newer."; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  say "$("$python" --version) is too old; the kit needs Python 3.10 or newer."
  exit 2
}

files=(requirements.txt "$@")
stamp=.venv/installed # one line for every list that is installed: its checksum and its name
missing=()
for file in "${files[@]}"; do
  line="$(cksum < "$file") $file"
  [ -x .venv/bin/python ] && grep -qxF -- "$line" "$stamp" 2>/dev/null || missing+=("$file")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if ! [ -x .venv/bin/python ]; then
  # the folder that holds a torch worth keeping, or nothing
  kept="$("$python" - << 'PYTHON' 2> /dev/null || true
import pathlib, torch
if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 10):
    print(pathlib.Path(torch.__file__).parent.parent)
PYTHON
)"
  say "Making .venv with $("$python" --version)"
  "$python" -m venv .venv || {
    say "Python could not make a virtual environment. On Debian and Ubuntu: sudo apt install python3-venv"
    exit 2
  }
  if [ -n "$kept" ]; then
    say "Using the torch that is already in $kept"
    "./.venv/bin/python" -c 'import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "torch_of_active_environment.pth").write_text(sys.argv[1] + "\n")' "$kept"
  fi
fi

# a virtual environment of uv's has no pip; what is in it stays
.venv/bin/python -m pip --version > /dev/null 2>&1 || .venv/bin/python -m ensurepip > /dev/null || {
  say ".venv has no pip, and Python could not put it there. On Debian and Ubuntu: sudo apt install python3-venv"
  exit 2
}

# a torch that is new enough is the one to keep: leave it out of the list
new_enough='import sys, torch; sys.exit(tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10))'
list="$(mktemp)"
constraints="$(mktemp)"
trap 'rm -f "$list" "$constraints"' EXIT
if .venv/bin/python -c "$new_enough" 2> /dev/null; then pattern='^torch=='; else pattern='^$'; fi
for file in "${missing[@]}"; do grep -v -- "$pattern" "$file" >> "$list"; done
grep -v -- "$pattern" constraints.txt > "$constraints" # the tested versions of everything else
say "Installing ${missing[*]} into .venv: up to 1 GB without a GPU build of torch, some 5 GB with one. This is done once."
# a line for each package shows that it goes on; the log has everything
.venv/bin/python -m pip install --disable-pip-version-check --progress-bar off --log .venv/install.log \
  --requirement "$list" --constraint "$constraints" 2>&1 |
  sed -unE 's/^(Installing collected packages):.*/\1 .../p; t; s/ \(from .*//; /^ *(Collecting|Building|ERROR|error)/p' >&2 || {
  say "The packages could not be installed: see above, and .venv/install.log for all of it. Is the network there, and"
  say "enough disk? Run it again to go on."
  exit 2
}
for file in "${missing[@]}"; do
  { grep -vF -- " $file" "$stamp" 2>/dev/null || true; echo "$(cksum < "$file") $file"; } > "$stamp.new"
  mv "$stamp.new" "$stamp"
done
say "The kit is set up in .venv"
