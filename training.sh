#!/usr/bin/env -S bash #
# Fine-tune an RWKV model (RWKV-7, -6 or -5): set the values below, then run ./training.sh
#   ./training.sh --dry-run   shows what would happen and two samples, then stops      先看计划和样本，不训练
#   ./training.sh --find-lr   tries which learning rates these settings bear           试出合适的学习率
#   ./training.sh --selftest  checks what computes on this machine (OP)                检验本机算子
#   ./training.sh --help      tells the rest
# A copy of this file under any name, anywhere in the project, works as well: one file per experiment.
# 修改下面的值，然后运行 ./training.sh。可以复制本文件到项目内任意位置、任意名字，一个实验一个文件。
[ -n "${BASH_VERSION:-}" ] || { echo "Run this with bash: bash $0" >&2; exit 2; } #
! grep -q $'\r$' -- "${BASH_SOURCE[0]:-}" 2>/dev/null || { printf "%s has Windows line ends. Run: sed -i 's/\\\\r$//' -- %q\n" "$0" "$0" >&2; exit 2; } # Windows 换行
set -euo pipefail
# the project is the first folder at or above this file that holds the kit
_root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
while [ ! -f "$_root/rwkv_peft/run.sh" ]; do
  [ "$_root" != / ] || { echo "$0: there is no rwkv_peft/ at or above this file; keep it inside the project." >&2; exit 2; }
  _root="$(dirname -- "$_root")"
done
export _given; _given="$(compgen -e 2>/dev/null | tr '\n' ' ' || true)" # what the shell has set does not count, and is told
set -a # every variable below is handed to Python                              以下变量都会传给 Python

############################################ What to train  训练什么 ############################################

# How to fine-tune; README compares them. 微调方法（对比见 README）
#   lora           small matrices beside the frozen weights: little memory, the usual choice      低显存，一般选它
#   pissa          LoRA that begins in the weights' main directions: learns faster                收敛更快的 LoRA
#   bone, miss     one matrix per layer (MiSS, once called Bone and DiSHA): half of LoRA's size   参数量为 LoRA 的一半
#   bat            the same with the weights mixed in: slower, for small models                   更慢，适合小模型
#   state_tuning   only the state that a text begins with: a style, a persona; a tiny file        只训初始 state，适合风格
#   lisa           all of a few layers at a time, others in turn                                  分层轮流全参
#   full           every weight: most memory, for pretraining and large data sets                 全参，显存最大，用于预训练
#   none           no adapters: only what lora_parts names (time, ln, emb, head)                  不加适配器
#   peft           any other method of the peft package, told by PEFT_CONFIG                      peft 库的其它方法
FINETUNE_MODE=lora

# What is trained. att and ffn get the method's adapters on all their matrices; the others are trained whole: time (token-shift
# mixes, decays and their low-rank parts), ln (norms), emb, head. Not for full and state_tuning. (A folder for the peft package,
# ./merge.sh --export peft, can hold att and ffn alone.)
# 训练哪些部分：att、ffn 加适配器；time、ln、emb、head 直接训练
lora_parts="att,ffn,ln"

# 1: emb and head as well (large: saved whole with every checkpoint). 是否同时训练词嵌入与输出头
EMB_FINETUNE=0

# The base model, .pth or .safetensors: a name in model/, or any path (spaces are fine). Version and sizes are read from the file.
# 底模（.pth 或 .safetensors）：model/ 下的文件名，或任意路径（可含空格）。版本与尺寸自动读取。
MODEL_PATH="rwkv7-tiny.pth"

# The tokenized data: the name that ./make_tokenize.sh printed, in data/, without ending; or any path. A mixture of several:
# names with weights, like "chat:0.7 my code:0.3": of 10 rows (packs), 7 and 3; each file goes round as often as that takes.
# 数据：make_tokenize.sh 生成的名字（data/ 下，不带后缀），或任意路径。混合多份数据："chat:0.7 code:0.3"，按行数比例
DATA_PATH="sample"

# The folder of this run under output/. Empty: data, method and time of the start. A run that was stopped goes on; one that is
# finished is never overwritten.
# 本次训练在 output/ 下的文件夹名；留空自动命名。已有的结果绝不会被覆盖。
RUN_NAME=""

# The model's version and sizes. auto reads them from the file; a number is only checked against it.
# 模型版本与尺寸：auto 从文件读取；填数字则仅用于核对。
MODEL_VERSION=auto
# Number of layers. 层数
N_LAYER=auto
# Width. 宽度
EMBD_SIZE=auto
# Vocabulary rows. 词表大小
VOCAB_SIZE=auto
# Whose ids the tokenized data hold. 数据所用的词表
#   world   the World vocabulary of all official RWKV-5, -6 and -7: a sample is decoded, and data of another one are refused
#   own     a vocabulary of the model's own (music, proteins): ids are not looked at. (Nor are they where VOCAB_SIZE is not 65536.)
#   world：官方模型的词表，抽样解码检查，其它词表的数据会被拒绝；own：自定义词表，不检查
VOCABULARY=world

############################################### Data  数据 ######################################################

# Longest piece of text that is trained in one go, in tokens. OVERLONG says what becomes of longer rows.
#   auto   the longest row, at most 4096 (infctx: whatever it is); packs of short rows are 512, or less where data are few
#   Memory grows with it. make_tokenize.sh prints max_length.      显存随它增长；auto 取最长样本，最多 4096
CTX_LEN=auto

# What becomes of rows that are longer; the start-up says how many there are. Not for get and concat, which cut nothing off.
# A cut adds no end token: the model does not learn to stop from rows that lost their end.    被截断处不会补结束符，也不会学到停止
#   truncate        the first CTX_LEN tokens                                             保留开头
#   truncate-left   the last CTX_LEN tokens                                              保留结尾
#   drop            left out                                                             丢弃整条
#   split           several pieces, every token once                                     切成多段，全部使用
OVERLONG=truncate

# How rows become batches. 组批方式
#   pack   several rows behind one another up to CTX_LEN, kept apart: no padding, fastest    多条拼接、互相隔离，最快
#   bucket one row per place, rows of like length together: little padding                   长度相近的分桶，少量补齐
#   pad    one row per place, filled up to the longest of the batch                          每条一格，补齐
#   only   one row per place, as long as it is                                               每条一格，不补齐
#   get    pieces of CTX_LEN tokens that ignore where rows end (pretraining)                 不分行，用于预训练
DATALOAD=pack

# DATALOAD=pack: how rows lie in a pack. 拼接方式
#   isolated   each begins with an empty state, as if it were alone                     互相隔离，微调用
#   concat     all in one long text, an end-of-text token between (not learnt where a row has none), cut at CTX_LEN
#                                                                                       首尾相连不重置，预训练用
PACK=isolated

# DATALOAD=bucket: the longest row of each bucket, rising multiples of 16, like "64 128 256 512"; the last one is the context.
#   auto: up to 6, chosen so that little is filled up                                    各桶的最大长度，auto 自动选择
TRAIN_LENGTHS=auto
# Rows of each bucket that go through one GPU at once, like "32 16 8 4". auto: TOKEN_BUDGET / length. 各桶的微批大小
TRAIN_BATCH_SIZES=auto
# Tokens that go through one GPU at once. auto: about 4096, and at least 16 optimizer steps an epoch. 每个微批的词元数
TOKEN_BUDGET=auto

# DATALOAD=get, 1: take the windows in RWKV-LM's order (magic prime); it leaves out the last few. 是否按 RWKV-LM 的质数顺序取样
MAGIC_PRIME=0

# Which tokens the model learns. 哪些部分计入损失
#   qa     what the Assistant says, in every turn          只学 Assistant 的每一轮回答
#   last   only the last answer of a row                   只学最后一轮回答
#   pad    all text of a row                               学整条文本
#   none   all text; with get and concat also across rows  全部，get 与 concat 模式下跨行也学
#   se     what stands between MASK_START and MASK_END     只学两个标记之间的部分
# qa and last need turns: "User: ...", a blank line, "Assistant: ...". Rows without an Assistant are left out, and counted.
LOSS_MASK=qa

# LOSS_MASK=se: text before and behind what is learnt, like "Assistant:" and "\n\n" (\n: new line, \t: tab); else empty.
# The end is learnt too, and so is the end of a row that comes first. Roles do not matter.       se 模式的起始标记
MASK_START=""
# ... and the text that ends it. 结束标记
MASK_END=""

# 1: a new order every epoch, the same for the same SEED. 0: the order of the file (pack: the same packs every epoch). 是否打乱
DATA_SHUFFLE=1

# Any whole number; the same number gives the same run. 随机种子，相同种子结果相同
SEED=42

# 1: train straight from rows, encoded on the way as make_tokenize.sh says. DATA_PATH is then a file or folder of rows, like
# "my.jsonl" or "big.parquet", or a pipe. Set CTX_LEN and MAX_STEPS, and EPOCH_COUNT=1.        边读边编码，直接训练原始数据
STREAMING=0
# STREAMING=1: how many optimizer steps the run has; files are read again when they end. Else 0. 总步数
MAX_STEPS=0
# STREAMING=1: rows that wait to be shuffled; more is better mixed and takes more memory. 打乱缓冲区的行数
STREAM_BUFFER=20000

# The way through long texts. 长文本方式
#   none     all of a micro-batch at once: memory grows with CTX_LEN                       一次通过，显存随长度增长
#   infctx   CHUNK_CTX tokens at once, the state is carried on: any CTX_LEN in the memory of one chunk   分块，显存固定
TRAIN_TYPE=none

# infctx: tokens that go through at once. infctx 分块长度
CHUNK_CTX=512

# infctx: where gradients end. 梯度
#   detach   at the border of a chunk: fastest; what lies further back is read, but not learnt to be written   截断
#   full     nowhere: the result of TRAIN_TYPE=none to rounding, for about a third more time               完整反传
INFCTX_GRAD=detach

########################################### How long  训练多久 ###################################################

# How many epochs. 1-3 for thousands of rows, more for a few hundred. 轮数：数千条 1-3 轮，几百条可更多
EPOCH_COUNT=3

# Micro-batches per epoch and GPU. auto: every row once. Smaller: shorter epochs that go on through the data in turn.
# make_tokenize.sh lists numbers that divide the rows evenly (for DATALOAD=pad and only; pack counts packs), but any number
# works.                                                              每轮微批数；auto 每条恰好一次，任意数字均可
EPOCH_STEPS=auto

# Save every so many epochs; the last one is always saved. 每多少轮保存一次，最后一轮总会保存
EPOCH_SAVE=1

# Save where the run is (output/RUN/state/: weights, optimizer, place in the data) every so many optimizer steps, with every
# saved epoch, and when it is stopped. ./training.sh again goes on from there as if it had never stopped. 0: not by steps.
# Beside it lies rwkv-step-N.pth, what was trained until then: ./merge.sh step-N
# 每多少步保存一次断点和 rwkv-step-N.pth（另外每轮保存及中断时也会保存断点）；再次运行即可精确续训。0 为不按步保存
SAVE_STEPS=100

# How many of these states, and of rwkv-step-N.pth, are kept. A state takes 12 bytes for each trained value with OPTIM=adamw.
# 0: none are saved, and a run that was stopped cannot go on. 保留几个断点；0 为不保存断点，中断后无法续训
KEEP_LAST=2

# Rows (with DATALOAD=pack: packs) that go through one GPU at once. More is faster and takes more memory. bucket: auto.
#   auto: about 4096 tokens at once, and at least 16 optimizer steps an epoch if the data allow it
#   out of memory? halve it and double MINI_BSZ (and EPOCH_STEPS, if that is a number): the result is the same
#   显存不足就减半，并把 MINI_BSZ 加倍（EPOCH_STEPS 若为数字也加倍），结果不变
MICRO_BSZ=auto

# Micro-batches per optimizer step: MICRO_BSZ * MINI_BSZ * GPU_COUNT rows or packs make one step. Aim at 4-8 rows a step
# for under 1000 rows, 8-16 for under 5000, 32 and more above; a pack holds several rows, so 1 is often enough.  梯度累积次数
MINI_BSZ=1

######################################### Learning rate  学习率 ##################################################

# First and last learning rate. 初始与最终学习率
#   lora, pissa, bone, bat: 1e-4 to 5e-5 for 0.1B-3B, 2e-5 above; full, lisa: 1e-5
#   state_tuning: 1e-3 for 0.1B to 1e-2 for 7B, LR_FINAL a tenth of it; above 3e-2 is warned of: 1 destroys an RWKV-7   高于 3e-2 会警告，1 会毁掉 RWKV-7
# (Decays learn at twice the rate, as in the official trainer; they are trained by full and by lora_parts with time.)
LR_INIT=1e-4
# The last one; LR_SCHEDULE says how it gets there. 最终学习率
LR_FINAL=1e-5

# The way from LR_INIT to LR_FINAL, over the whole run. 学习率曲线
#   cos        half a cosine: the usual choice              余弦，常用
#   wsd        constant, then down in the last tenth        恒定，最后十分之一下降
#   exp        the same factor every step                   指数
#   linear     a straight line                              直线
#   constant   LR_INIT all the way; LR_FINAL is not used    恒定
LR_SCHEDULE=cos

# Optimizer steps from 0 up to LR_INIT at the start. 预热步数
WARMUP_STEPS=10

# Optimizer. 优化器
#   adamw      8 bytes for each trained value                                                每个参数 8 字节
#   adamw8bit  2 bytes; needs: .venv/bin/python -m pip install bitsandbytes                            需要 bitsandbytes
#   lion       4 bytes; wants a third to a tenth of AdamW's LR_INIT; needs bitsandbytes      学习率应为 AdamW 的 1/3 到 1/10
#   lion8bit   1 byte; as lion                                                               同 lion，更省显存
#   adafactor  next to nothing; for full fine-tuning where memory is short                   几乎不占显存，适合全量微调
# Without a GPU, those of bitsandbytes take up to 25 bytes more for each value of the largest tensor. 无显卡时，bitsandbytes 的几种另占内存
OPTIM=adamw

# Its memory of gradients, and of their squares (adafactor has its own). 0.9 and 0.99 suit fine-tuning. 动量
BETA1=0.9
# ... of their squares. 二阶动量
BETA2=0.99

# Adam's smallest divisor. 数值稳定项
ADAM_EPS=1e-8

# Pull towards zero, on large matrices only (never norms, mixes, decays). 0 for LoRA, 0.1 for pretraining. 权重衰减
WEIGHT_DECAY=0

# Largest length of the gradient; longer ones are scaled down. 0: no limit. 梯度裁剪，0 为不裁剪
GRAD_CLIP=1.0

# A step whose loss or gradient is NaN or infinite is left out, and said. So many in a row end the run, with the batch named.
# 损失或梯度为 NaN/无穷的步会跳过并提示；连续这么多步则停止
NAN_LIMIT=3

############################################# LoRA  #############################################################

# Rank: size of the added matrices. 16-32 for a style, 64-128 for knowledge. 秩：风格 16-32，知识 64-128
lora_r=64

# Strength: the change is multiplied by lora_alpha / lora_r. Twice the rank is usual; merge.sh reads it from the checkpoint.
# 强度，通常为秩的两倍；合并时自动读取，无需再填
lora_alpha=128

# Share of the adapter's inputs dropped at random while training. 0-0.1. 丢弃率
lora_dropout=0.01

# 1: multiply by lora_alpha / sqrt(lora_r) instead, which keeps large ranks lively (rsLoRA). 是否用 rsLoRA
use_rslora=0

# 1: train the length of every row beside its direction (DoRA): a little better, and slower. 是否用 DoRA
use_dora=0

# How much faster lora_B learns than lora_A (LoRA+; its authors take 16). 1: alike. LoRA+ 学习率倍数，1 为不用
loraplus_lr_ratio=1

# Go on from an earlier run's LoRA: my-run, my-run/2, my-run/best or a file. Rank, alpha and base must be the same.
# 从已有 LoRA 继续：填训练名、训练名/轮或文件，秩、alpha、底模须一致
lora_load=""

############################################# PiSSA  ############################################################

# Rank: how many main directions of each matrix are trained. 秩
pissa_r=64

# Rounds that look for them before training: 0 is exact and slow, 8 is close. 奇异值分解迭代次数，0 为精确
svd_niter=8

# Go on from an earlier run's PiSSA: my-run/2 or a file (with its init_pissa.pth). 从已有 PiSSA 继续
pissa_load=""

# Where its init_pissa.pth is, if not beside it; without pissa_load: begin a new run with that. 初始分解文件，一般留空
pissa_init=""

######################################## MiSS (Bone), Bat  ######################################################

# Rank of bone, miss and bat. bat needs one that divides the widths of all layers. 秩；bat 需整除各层宽度
disha_r=64

# Go on from an earlier run of the same method: my-run/2 or a file. 从已有结果继续
disha_load=""

########################################### State tuning  #######################################################

# 1: learn the two token shifts of every layer as well. Other programs do not read them; chat.sh does. 是否同时训练 token shift
state_shifts=0

# Go on from an earlier state: my-run/2, a file of a run, or a .pth of blocks.N.att.time_state. 从已有 state 继续
state_load=""

############################################## LISA  ############################################################

# Layers that are trained at a time. 同时训练的层数
lisa_r=2

# Optimizer steps until others are drawn. 每多少步换一批层
lisa_k=20

########################################## The peft package  ####################################################

# FINETUNE_MODE=peft: a JSON file with the method and its settings, like {"peft_type": "LOHA", "r": 16, "alpha": 16}.
# It needs the package: .venv/bin/python -m pip install "peft==0.21.*"                          peft 配置文件（JSON）
PEFT_CONFIG=""

# Go on from an earlier run of it: my-run/2 or a file. 从已有结果继续
peft_load=""

########################################### Machine  机器 ########################################################

# Numbers to compute in. auto: bf16 where the processor gains by it, else fp32 (GPUs: fp16). 计算精度
#   bf16   half the memory, the usual choice    fp32   exact and slow
#   fp16   for GPUs without bf16                tf32   fp32 with faster, coarser products (GPUs)
PRECISION=auto

# How the frozen weights lie in memory while adapters are trained: lora, pissa, bone, bat, state_tuning, none, peft. 量化
#   none   as they are                                        不量化
#   int8   half of bf16, hardly any error                     显存减半，几乎无损
#   fp8    half of bf16                                       显存减半
#   nf4    a quarter, the usual 4 bits; 4bit is another word for it      显存约四分之一
#   fp4    a quarter, coarser                                 更粗
# merge.sh folds into the original weights, so nothing of the error stays. 合并到原始权重，不损失精度
QUANT=none

# What of them: att, ffn (the large matrices); emb and head too, if memory is very short. nf4 and fp4 leave layer 0's att.output as
# it is: one channel of its input is millions of times larger than the others; a 2.9B model loses 2.4 % instead of 4.0 % that way.
# "att,ffn,blocks.0.att.output" compresses it as well. 量化哪些部分；4 位时默认不量化第 0 层的 att.output，写上 blocks.0.att.output 则一并量化
QUANT_PARTS="att,ffn"

# What computes: auto; cuda (kernels for NVIDIA GPUs, compiled at first use and tried against the definition); fla (Triton kernels,
# tried as well; needs: .venv/bin/python -m pip install "fla-core==0.6.0" einops); cpu (C++ kernels, compiled at first use, want g++); torch
# (everywhere, slower); reference (the slow definition).
# 算子：auto 自动选择；cuda 为 NVIDIA 显卡内核（首次使用时编译并自检）；fla 为 Triton 内核（需另装）；cpu 为 C++ 内核（需要 g++）；torch 通用但较慢
OP=auto

# What the backward pass computes again instead of keeping it. 梯度检查点，省显存
#   0          nothing: fastest                                              不重算，最快
#   selective  what is cheap: about a third less memory, hardly slower       只重算便宜的部分
#   1          all: much less memory, about a third more time                全部重算，最省显存
GRAD_CP=1

# Where a frozen embedding lies: 1 in the host's memory, from which only the rows of a batch are sent; 0 on the GPU; auto: on the host
# if it would take a hundredth of the GPU's memory or more. 冻结的词嵌入放在内存（1）还是显存（0）；auto 在占显存 1% 以上时放内存
EMB_ON_CPU=auto

# 1: on a GPU, start all kernels of a micro-batch at once where its shape has come before (DATALOAD=pad or bucket, PACK=concat; other
# packs hardly repeat): for small models on few tokens, whose GPU waits for the host. Tried against the kernels one by one before it is
# used; not yet run on a GPU by its authors. CUDA 图：小模型小批量时减少等待（适用于 pad、bucket、PACK=concat）；作者尚未在显卡上运行过
CUDA_GRAPHS=0

# GPUs on this machine (without a GPU: processes). 显卡数量（无显卡时为进程数）
GPU_COUNT=1

# Machines ("nodes"). Run this script on each, with the same settings but for NODE_RANK; README tells the rest. 机器（节点）数，每台都运行本脚本
NNODES="${NNODES:-1}"
# This one, counted from 0; may be given before the command: NODE_RANK=1 ./training.sh   本机编号，从 0 开始，可写在命令前
NODE_RANK="${NODE_RANK:-0}"
# Address of node 0 (hostname -I tells it there), and a port that nobody uses (auto: 29500). 主节点地址与端口
MASTER_ADDR="${MASTER_ADDR:-}"
# ... the port. 端口
MASTER_PORT="${MASTER_PORT:-auto}"
# The network device to the other nodes, if the wrong one is found: without GPUs; empty: found. 节点间网卡名（CPU），空则自动
GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-}"
# ... and with GPUs. 节点间网卡名（GPU）
NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-}"

# How several GPUs work together. The same steps and results with each; a run may go on with another. 多卡策略，结果相同，续训时可更换
#   auto                  ddp for more than one GPU                                            多卡时为 ddp
#   ddp                   every GPU holds everything: fastest; for LoRA and its kin            每卡一份，最快，适合 LoRA
#   fsdp                  weights, gradients and the optimizer in pieces: large models, full   权重、梯度、优化器均分片，适合全参与大模型
#   deepspeed_stage_1     the optimizer in pieces                                              优化器分片
#   deepspeed_stage_2     and the gradients                                                    梯度也分片
#   deepspeed_stage_3     and the weights, like fsdp                                           权重也分片
#   deepspeed_stage_2_offload, deepspeed_stage_3_offload: the pieces lie in the host's memory: slow, least GPU memory  卸载到内存
# fsdp and deepspeed want OPTIM=adamw                                                        需 OPTIM=adamw
STRATEGY=auto

# Processes per GPU that prepare batches while it computes. auto: 1, without a GPU 0. 每卡的数据加载进程数
NUM_WORKERS=auto

# Held-out data whose loss is looked at while training: a name in data/. auto: NAME.valid of every DATA_PATH, which
# VALID_PERCENT in make_tokenize.sh makes; none: no looks. 验证集；auto 为 make_tokenize.sh 留出的 NAME.valid；none 不验证
VAL_DATA=auto

# Optimizer steps from one look to the next, beside the one before training. 0: at the end of every epoch. One is at the end. 验证间隔，0 为每轮结束
VAL_STEPS=0

# So many looks without a better one end the training. 0: never. 早停：连续这么多次没有变好就结束，0 为不用
VAL_PATIENCE=0

# 1: keep what was trained where the validation was best, as rwkv-best.pth: ./merge.sh best. 是否保留验证最好的一份：./merge.sh best
KEEP_BEST=0

# Questions that the model answers while it learns, to output/<run>/samples.md: one, several with | between, or a .txt file in data/
# with one a line; empty: none. 训练中让模型回答的问题（用 | 分隔，或 data/ 中每行一问的 .txt 文件），空则不用
SAMPLE_PROMPTS=""

# Optimizer steps from one round of answers to the next, beside the one before training. 0: at the end of every epoch. 回答间隔
SAMPLE_STEPS=0

# Longest answer, in tokens. 回答的最多 token 数
SAMPLE_TOKENS=100

# Name of a wandb project; empty: no wandb. WANDB_MODE=offline in your shell keeps it on this machine. wandb 项目名，空则不用
WANDB=""

# 1: for tensorboard as well: tensorboard --logdir output. It needs: .venv/bin/python -m pip install tensorboard. 是否写 tensorboard 日志（需安装）
TENSORBOARD=0

# Name of a SwanLab project; empty: none. SWANLAB_MODE=offline in your shell keeps it here. It needs: .venv/bin/python -m pip install swanlab. SwanLab 项目名
SWANLAB=""

# Name of a trackio project; empty: none. It stays on this machine. It needs: .venv/bin/python -m pip install trackio. trackio 项目名
TRACKIO=""

set +a
exec "$_root/rwkv_peft/run.sh" train "${BASH_SOURCE[0]}" "$@"
