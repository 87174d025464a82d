#!/usr/bin/env bash
# Everything about one NVIDIA GPU with one command, in less than 9 minutes: what the kernels compute, the tests that need a GPU,
# and bench/gpu.py. For a bare machine with Python and torch for CUDA; without a network, name a folder with wheels of what is
# missing.      用一条命令检验并测速一块 NVIDIA 显卡
#   bench/gpu.sh [--wheels FOLDER] [--json FILE] [--minutes N]
set -euo pipefail
cd "$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
wheels="" json="" minutes=5
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels) wheels="$2"; shift 2 ;;
    --json) json="$2"; shift 2 ;;
    --minutes) minutes="$2"; shift 2 ;;
    *) echo "$1: is not an option; there are --wheels, --json, --minutes" >&2; exit 2 ;;
  esac
done
python="$(command -v python3)"
[ -x .venv/bin/python ] && python=.venv/bin/python
site="$(mktemp -d)"
trap 'rm -rf -- "$site"' EXIT
if [ -n "$wheels" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
echo "== what the kernels compute"
"$python" -c 'from rwkv_peft.train.selftest import selftest; selftest()' || echo "the self-test FAILED"
echo "== the tests that need a GPU"
timeout 150 "$python" -m pytest -q -m gpu tests/ops/test_gpu.py -p no:cacheprovider || echo "the tests FAILED, or there is no pytest"
echo "== times"
"$python" bench/gpu.py --minutes "$minutes" ${json:+--json "$json"}
