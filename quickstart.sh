#!/usr/bin/env -S bash #
# The whole road on a toy model, on any machine: ./quickstart.sh                    在任何机器上走完整个流程（玩具模型）
# Installs into .venv, builds a tiny RWKV-7 and pretrains it, tokenizes data/sample.jsonl, tunes with LoRA, merges, and
# asks base and merged model the same question. It works in quickstart/ and in runs of its own; your files stay as they are.
[ -n "${BASH_VERSION:-}" ] || { echo "Run this with bash: bash $0" >&2; exit 2; } #
! grep -q $'\r$' -- "${BASH_SOURCE[0]:-}" 2>/dev/null || { printf "%s has Windows line ends. Run: sed -i 's/\\\\r$//' -- %q\n" "$0" "$0" >&2; exit 2; } # Windows 换行
set -euo pipefail
cd "$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
if [ $# -gt 0 ]; then
  sed -n '2,4s/^# //p' "$0"
  case "$1" in -h | --help) exit 0 ;; *) echo "quickstart.sh takes no arguments." >&2; exit 2 ;; esac
fi
[ -f rwkv_peft/run.sh ] || { echo "quickstart.sh must lie in the project's folder." >&2; exit 2; }

step() { # bold on a terminal
  if [ -t 1 ]; then printf '\n\033[1m%s\033[0m\n' "$*"; else printf '\n%s\n' "$*"; fi
}

# copy FILE NEW: a new file; a link of that name goes, and what it leads to stays
copy() {
  rm -f -- "$2"
  cp -- "$1" "$2"
}

# copy_with FILE NAME=VALUE ...: a copy of training.sh with these values
copy_with() {
  local target="$1" pair
  shift
  copy training.sh "$target"
  for pair in "$@"; do
    sed -i "s|^${pair%%=*}=.*|${pair%%=*}=${pair#*=}|" "$target"
  done
}

# every setting that matters is set here: whatever you have made of training.sh, the toy run is the same
common=(RUN_NAME= MODEL_VERSION=auto N_LAYER=auto EMBD_SIZE=auto VOCAB_SIZE=auto VOCABULARY=world DATALOAD=pack DATA_SHUFFLE=1 SEED=42
  TRAIN_TYPE=none EPOCH_STEPS=auto EPOCH_SAVE=100 MICRO_BSZ=1 MINI_BSZ=1 LR_INIT=3e-3 LR_FINAL=3e-4
  LR_SCHEDULE=cos WARMUP_STEPS=10 OPTIM=adamw BETA1=0.9 BETA2=0.99 ADAM_EPS=1e-8 WEIGHT_DECAY=0 GRAD_CLIP=1.0 lora_r=64
  lora_alpha=128 lora_dropout=0 lora_parts=att,ffn,ln EMB_FINETUNE=0 lora_load= PRECISION=auto QUANT=none OP=auto
  GRAD_CP=0 GPU_COUNT=1 STRATEGY=auto WANDB=
  OVERLONG=truncate PACK=isolated TRAIN_LENGTHS=auto TRAIN_BATCH_SIZES=auto TOKEN_BUDGET=auto MAGIC_PRIME=0 MASK_START=
  MASK_END= STREAMING=0 MAX_STEPS=0 NUM_WORKERS=auto use_rslora=0 use_dora=0 loraplus_lr_ratio=1 pissa_load= pissa_init=
  disha_load= state_shifts=0 state_load= PEFT_CONFIG= peft_load= QUANT_PARTS=att,ffn)
# ... and of make_tokenize.sh
plain=(--prompt-type rwkv-world --eot doc --handler auto --map-keys '' --strict 0 --expand 0 --mask-history 0 --max-tokens 0
  --source-length 0 --target-length 0 --valid-percent 0 --seed 42)

./setup.sh
began=$SECONDS
now="$(date +%Y%m%d-%H%M%S)"
base=model/rwkv7-tiny.pth
mkdir -p quickstart model

step "1/6  A base model: $base, built and pretrained on data/pretrain.jsonl"
if [ -f "$base" ]; then
  echo "It is there already and is used as it is. (Remove it to build and pretrain it again.)"
else
  rm -f quickstart/untrained.pth
  rwkv_peft/run.sh init_model --layers 4 --width 128 --out quickstart/untrained.pth
  copy data/pretrain.jsonl quickstart/pretrain.jsonl
  ./make_tokenize.sh quickstart/pretrain.jsonl "${plain[@]}" | sed -n 1,2p
  copy_with quickstart/pretrain.sh "${common[@]}" FINETUNE_MODE=full MODEL_PATH=quickstart/untrained.pth \
    DATA_PATH=quickstart/pretrain "RUN_NAME=quickstart-pretrain-$now" LOSS_MASK=pad CTX_LEN=512 EPOCH_COUNT=5
  quickstart/pretrain.sh
  # copied beside its place, then renamed: the name never stands for half a file
  copy "output/quickstart-pretrain-$now/rwkv-4.pth" "$base.new"
  mv "$base.new" "$base"
fi

step "2/6  Tokens: ./make_tokenize.sh quickstart/sample.jsonl 4 (a copy of data/sample.jsonl)"
copy data/sample.jsonl quickstart/sample.jsonl
./make_tokenize.sh quickstart/sample.jsonl 4 "${plain[@]}"

step "3/6  LoRA: quickstart/training.sh (a copy of ./training.sh with the toy's settings): two samples, then the run"
copy_with quickstart/training.sh "${common[@]}" FINETUNE_MODE=lora MODEL_PATH=rwkv7-tiny.pth \
  DATA_PATH=quickstart/sample "RUN_NAME=quickstart-lora-$now" LOSS_MASK=qa CTX_LEN=272 EPOCH_COUNT=8
quickstart/training.sh --dry-run | sed '1,/^output/d'
quickstart/training.sh

step "4/6  Merge: ./merge.sh quickstart-lora-$now 7 (epochs count from 0: this is the last of 8)"
merged="rwkv7-tiny-quickstart-lora-$now-7.pth"
rm -f merge/rwkv7-tiny-quickstart-lora-*-7.{pth,json} # earlier toy results make room
RUN='' MODEL_PATH='' MERGE_BASE=original METHOD='' LORA_ALPHA='' PISSA_INIT='' rwkv_peft/run.sh merge merge.sh "quickstart-lora-$now" 7

step "5/6  The same question to both: ./chat.sh --model ... --temperature 0 --prompt ..."
question="How many steps does the Heron Bay lighthouse have?"
ask() { # whatever you have made of chat.sh
  MODEL_PATH="$1" ADAPTER='' PROMPT_TYPE=rwkv-world BOS=auto SYSTEM='' MAX_TOKENS=40 TEMPERATURE=0 TOP_K=0 TOP_P=1 SEED=1 PRECISION=auto \
    rwkv_peft/run.sh chat chat.sh --prompt "$question"
}
before="$(ask rwkv7-tiny.pth)"
after="$(ask "$merged")"
wanted="$(sed -n 's/.*Heron Bay lighthouse have?\\n\\nAssistant: \(.*\)"}/\1/p' data/sample.jsonl)"
printf 'question   %s\n' "$question"
printf 'sample     %s\n' "$wanted"
printf 'base       %s\n' "$before"
printf 'merged     %s\n' "$after"
if [ "$after" != "$wanted" ] || [ "$before" = "$wanted" ]; then
  echo "The merged model should have answered as the sample does, and the base should not. Please report this." >&2
  exit 1
fi

step "6/6  Done in $((SECONDS - began)) seconds after the installation"
cat << TEXT
The loss curves: output/quickstart-lora-$now/loss.png
Talk to the result: ./chat.sh --model $merged

With a real model:
  1. Put an RWKV .pth into model/ and your data into data/, like data/sample.jsonl
  2. ./make_tokenize.sh my.jsonl     and copy the lines that it prints into training.sh
  3. Set MODEL_PATH in training.sh, look with ./training.sh --dry-run, then ./training.sh
  4. ./merge.sh                      and load the file that it names in RWKV-Runner or with the rwkv package
README.md tells the rest; what fits your GPU too.
TEXT
