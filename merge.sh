#!/usr/bin/env bash
# Fold what a run learnt into its base: ./merge.sh EPOCH          把训练结果合并进底模
#   ./merge.sh 2               epoch 2 of the newest run -> merge/<base>-LORA-2.pth    最近一次训练的第 2 轮
#   RUN=my-run ./merge.sh 0    epoch 0 of the run output/my-run                        指定某次训练
#   ./merge.sh --help          tells the rest
# Method, rank and alpha are read from the checkpoint: nothing is typed twice. 方法、秩、alpha 自动读取，无需再填
[ -n "${BASH_VERSION:-}" ] || { echo "Run this with bash: bash $0" >&2; exit 2; }
set -euo pipefail
_root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
set -a

# The run: a folder in output/. Empty: the newest. 哪次训练，留空为最近一次
RUN="${RUN:-}"

# The base. Empty: the one that the run names, in model/ or where it lay then; its content is checked. 底模，一般留空
MODEL_PATH=""

set +a
exec "$_root/rwkv_peft/run.sh" merge.__main__ "${BASH_SOURCE[0]}" "$@"
