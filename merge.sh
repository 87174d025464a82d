#!/usr/bin/env -S bash #
# Fold what a run learnt into its base, and write files for other programs: ./merge.sh RUN EPOCH     合并，导出
#   ./merge.sh                 the newest run, its last epoch -> merge/<base>-<run>-<epoch>.pth    最近一次训练的最后一轮
#   ./merge.sh 2               its epoch 2; or last, best, step-300                                第 2 轮；或 last、best、step-300
#   ./merge.sh my-run 0        epoch 0 of the run output/my-run (or: RUN=my-run ./merge.sh 0)      指定某次训练
#   ./merge.sh --stack a/2 b/0               both runs, one after the other                        依次合并多个
#   ./merge.sh --average a/1:1 a/2:3         their weighted mean                                   加权平均
#   ./merge.sh 2 --export gguf         also as a file for llama.cpp; or safetensors, state, peft, rwkvcpp     导出
#   ./merge.sh 2 --export gguf --export safetensors    several at once                        一次导出多种
#   ./merge.sh --help          tells the rest
# Method, rank and alpha are read from the checkpoint: nothing is typed twice. 方法、秩、alpha 自动读取，无需再填
[ -n "${BASH_VERSION:-}" ] || { echo "Run this with bash: bash $0" >&2; exit 2; } #
! grep -q $'\r$' -- "${BASH_SOURCE[0]:-}" 2>/dev/null || { printf "%s has Windows line ends. Run: sed -i 's/\\\\r$//' -- %q\n" "$0" "$0" >&2; exit 2; } # Windows 换行
set -euo pipefail
_root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
export _given; _given="$(compgen -e 2>/dev/null | tr '\n' ' ' || true)" # what the shell has set does not count, and is told
set -a

# The run: latest, a name in output/, or a path. Empty: the newest. 哪次训练，留空为最近一次
RUN="${RUN:-}"

# The base, .pth or .safetensors. Empty: the one that the run names, in model/ or where it lay then; its content is checked. 底模，一般留空
MODEL_PATH=""

# A run on a compressed base (QUANT): fold into the original weights, or into the compressed ones as the run had them.
# (its name then ends in -quantised). 量化训练的结果合并到原始权重 (original)，还是量化后的权重 (quantised)
MERGE_BASE=original

############################ Only for files of RWKV-PEFT, which have no sidecar  仅用于 RWKV-PEFT 的文件 ############
# They need MODEL_PATH above. What the file holds: lora or pissa (both look alike); others are found out. 方法
METHOD=""

# The lora_alpha that a LoRA was trained with: a wrong one makes it too strong or too weak. 训练时的 lora_alpha
LORA_ALPHA=""

# The init_pissa.pth of a PiSSA, if it is not beside its file. PiSSA 初始分解文件
PISSA_INIT=""

set +a
exec "$_root/rwkv_peft/run.sh" merge "${BASH_SOURCE[0]}" "$@"
