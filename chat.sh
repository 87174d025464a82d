#!/usr/bin/env -S bash #
# Talk to a model: ./chat.sh                                                          与模型对话
#   ./chat.sh --prompt "How are you?"                        one answer, then leave     只答一句
#   ./chat.sh --adapter my-run/2                             a base with what a run learnt, before merging (latest, my-run/best)
#   ./chat.sh --model rwkv7-tiny-my-run-2.pth                a merged model; ADAPTER below is left out, and said so
#   ./chat.sh --diagnose latest                              does a run fit? underfit, overfit, rate too high or low   诊断训练结果
#   ./chat.sh --help                                         tells the rest
[ -n "${BASH_VERSION:-}" ] || { echo "Run this with bash: bash $0" >&2; exit 2; } #
! grep -q $'\r$' -- "${BASH_SOURCE[0]:-}" 2>/dev/null || { printf "%s has Windows line ends. Run: sed -i 's/\\\\r$//' -- %q\n" "$0" "$0" >&2; exit 2; } # Windows 换行
set -euo pipefail
_root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
export _given; _given="$(compgen -e 2>/dev/null | tr '\n' ' ' || true)" # what the shell has set does not count, and is told
set -a

# The model, .pth or .safetensors: a name in model/ or merge/, or any path. 模型
MODEL_PATH="rwkv7-tiny.pth"

# A checkpoint of a run: latest, my-run, my-run/2, my-run/best or a file; it says which base it belongs to. Empty: none. 适配器，可空
# --model alone asks for another model, and leaves this out. 命令行只写 --model 时，不用此适配器
ADAPTER=""

# The template to talk in, as in make_tokenize.sh; where a run or merged model tells its own, that is used. 对话模板，默认与训练一致
# auto: what it was trained with, else by the base's name: rwkv-g1 for G1 models, else rwkv-world   auto 按训练结果或模型名选择
PROMPT_TYPE=auto

# Token 0 before the first turn: 0 no, 1 yes, auto as the run was trained (without a run: as the template's clients do). 开头的词元 0
BOS=auto

# What the assistant is told at the start; empty: nothing. 系统提示
SYSTEM=""

# Longest answer, in tokens. 最长回答
MAX_TOKENS=300

# 0: the likeliest token every time; 1: the model's own spread. auto: the template's (World 0.7, G1 1). 温度
TEMPERATURE=auto

# Only the likeliest tokens that together have this share. auto: the template's (World 0.5, G1 0.28). 核采样
TOP_P=auto

# Only so many of the likeliest tokens, before TOP_P; 0: all. auto: the template's (World 0, G1 32). 只取概率最高的若干词元
TOP_K=auto

# The same number gives the same answers. 随机种子
SEED=42

# Numbers to compute in: auto, bf16, fp16, fp32. 计算精度
PRECISION=auto

set +a
exec "$_root/rwkv_peft/run.sh" chat "${BASH_SOURCE[0]}" "$@"
