#!/usr/bin/env bash
# Turn text into tokens: ./make_tokenize.sh FILE [EPOCHS=1] [MAX_TOKENS=0] [--no-eof]      把文本转成训练数据
#   ./make_tokenize.sh sample.jsonl 4          data/sample.jsonl -> data/sample.bin/.idx, 4 shuffled repeats
#   ./make_tokenize.sh "my chat.jsonl" 1 2048  leave out rows of more than 2048 tokens      去掉超过 2048 词元的行
#   --no-eof    rows do not end with token 0 (the model then does not learn to stop)         不加结束符
#   --help      tells the rest
# It ends with the lines to paste into training.sh.                            最后会打印要填入 training.sh 的内容
[ -n "${BASH_VERSION:-}" ] || { echo "Run this with bash: bash $0" >&2; exit 2; }
set -euo pipefail
_root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
set -a

# Any whole number; the same number gives the same order of rows. 随机种子，相同种子顺序相同
SEED=42

set +a
if [ $# -eq 0 ]; then set -- --help; fi
exec "$_root/rwkv_peft/run.sh" json2binidx.__main__ "${BASH_SOURCE[0]}" "$@"
