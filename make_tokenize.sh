#!/usr/bin/env -S bash #
# Turn text into tokens: ./make_tokenize.sh FILE [EPOCHS=1] [MAX_TOKENS] [--no-eof] [--preview N]      把文本转成训练数据
#   ./make_tokenize.sh sample.jsonl 4          data/sample.jsonl -> data/sample.bin/.idx, 4 shuffled repeats
#   ./make_tokenize.sh "my chats" --preview 3  a folder of files: show 3 rows token by token, write nothing   先预览
#   ./make_tokenize.sh qa.csv --prompt-type rwkv-g1    any setting below, for this one call      任何设置都可写在命令行
#   --help      tells the rest: formats, kinds of rows, what is written
# It ends with the lines to paste into training.sh.                            最后会打印要填入 training.sh 的内容
[ -n "${BASH_VERSION:-}" ] || { echo "Run this with bash: bash $0" >&2; exit 2; } #
! grep -q $'\r$' -- "${BASH_SOURCE[0]:-}" 2>/dev/null || { printf "%s has Windows line ends. Run: sed -i 's/\\\\r$//' -- %q\n" "$0" "$0" >&2; exit 2; } # Windows 换行
set -euo pipefail
_root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
export _given; _given="$(compgen -e 2>/dev/null | tr '\n' ' ' || true)" # what the shell has set does not count, and is told
set -a

########################################## What rows become  渲染成什么文本 ##########################################

# The template that dialogues are written in. What you train with is what you must chat with. 对话模板，训练与推理须一致
#   rwkv-world         User: ... Assistant: ...  with a blank line between: all RWKV World models      通用
#   rwkv-g1            the same for G1 models: answers keep their blank lines and thoughts             G1 模型
#   rwkv-g1-think      the answer begins with <think: always a thought                                 总是先思考
#   rwkv-g1-fakethink  an empty thought before every answer: quick and good                            空思考
#   rwkv-g1-tools      function calls: the answer begins with ```json                                  函数调用
#   rwkv-g1-rag        material first, then the question                                               先资料后提问
#   rwkv-qa            Question: ... Answer: ...              rwkv-instruct   Instruction: Input: Response:
#   alpaca chatml default ext-cat empty                       formats of other models                  其他格式
#   my.json            your own: {"format_user": "Q: {{content}}", "format_assistant": "A: {{content}}"}    自定义模板
PROMPT_TYPE=rwkv-world

# How rows end. 结束方式
#   doc    token 0: the end of the document                                          词元 0
#   blank  a blank line, no token 0        both   a blank line, then token 0         空行；空行加词元 0
#   x17    \x17 behind every answer, no token 0                                      每个回答后加 \x17
EOT=doc

# What rows are. auto finds it for every row by its columns; others: text alpaca sharegpt openai prompt-completion (or the
# field's names, like AlpacaStyleInstructionHandler).                                   行的类型，auto 自动识别
HANDLER=auto

# Other names of columns, as JSON: '{"prompt": "question", "response": "reply"}'. Keys: prompt query response system history
# messages text tools think. A part that is to be left out has the name "".             自定义列名
MAP_KEYS=""

# What a document is in .txt: file (all of it), line, or paragraph (up to a blank line). txt 文件中一篇文档的划分
TXT_MODE=file

# 1: undo mojibake (UTF-8 that was read as cp1252 and saved: "Ã©" for "é") where every byte can be restored. 修复乱码
REPAIR=1

# 1: stop at the first row that cannot be used. 0: leave such rows out, count them, write them to NAME.rejects.jsonl. 严格模式
STRICT=0

########################################## What is learnt  学哪些回答 ################################################

# 1: a row of its own for every answer, in which only that answer is learnt. It costs more and learns the same. 逐轮展开
EXPAND=0

# 1: only the last answer of a dialogue is to be learnt, whatever LOSS_MASK says later. 只学最后一轮回答
MASK_HISTORY=0

################################################ Length  长度 #######################################################

# The longest row in tokens, its terminator included; 0: no limit. The third word of the command says the same. 每行最大词元数
MAX_TOKENS=0
# The longest turn of anybody but the assistant; 0: no limit. 提问等单轮上限
SOURCE_LENGTH=0
# The longest answer, its terminator included; 0: no limit. 单个回答上限
TARGET_LENGTH=0

# What happens to what is longer. The terminator always stays. 超长处理
#   drop            the row is left out, and counted                      丢弃整行
#   truncate        its end is cut off                                    截断结尾
#   truncate-left   its beginning is cut off                              截断开头
#   split           the row becomes several (MAX_TOKENS only)             切成多行
OVERLONG=drop

################################################## Rest  其他 #######################################################

# Percent of the rows that are held out in NAME.valid, never trained on; equal rows stay together. 留作验证的百分比
VALID_PERCENT=0

# The part of the data that becomes NAME.valid instead: a list of a .json ("test"), or the files of a folder that are named so.
# Empty: such parts are not used, and are named in the report. 作为验证集的部分（如 test）；为空则不使用，仅在报告中列出
VALID_SPLIT=""

# Any whole number; the same number gives the same order of rows. 随机种子，相同种子顺序相同
SEED=42

# Processes that encode. auto: every core, where there is work for it. The result is the same. 进程数，结果不变
WORKERS=auto

# 1: encode again even if nothing has changed since the last time. 强制重新编码
OVERWRITE_CACHE=0

set +a
if [ $# -eq 0 ]; then set -- --help; fi
exec "$_root/rwkv_peft/run.sh" json2binidx.__main__ "${BASH_SOURCE[0]}" "$@"
