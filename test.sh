#!/usr/bin/env -S bash #
# Set up what is needed, then run the tests: ./test.sh                                          运行测试
#   ./test.sh                      the default suite, some minutes
#   ./test.sh -m "not gpu"         the slow ones as well
#   ./test.sh --fuzz MINUTES       feeds damaged and hostile files to every reader (tests/fuzz)
#   ./test.sh -k merge -x          anything else goes to pytest as it is
[ -n "${BASH_VERSION:-}" ] || { echo "Run this with bash: bash $0" >&2; exit 2; } #
! grep -q $'\r$' -- "${BASH_SOURCE[0]:-}" 2>/dev/null || { printf "%s has Windows line ends. Run: sed -i 's/\\\\r$//' -- %q\n" "$0" "$0" >&2; exit 2; } # Windows 换行
set -euo pipefail
cd "$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
if [ "${1:-}" = --fuzz ]; then
  ./setup.sh requirements-test.txt requirements-fuzz.txt
  exec .venv/bin/python tests/fuzz "${@:2}"
fi
./setup.sh requirements-test.txt
case " $* " in *" -m "*) ;; *) set -- -m "not slow and not gpu" "$@" ;; esac
unset PYTHONDONTWRITEBYTECODE  # the tests start many processes: each would compile the kit again
# a worker per core, and every file in one of them; -n 0 behind it for a single process
exec .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
