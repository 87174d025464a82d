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
#   auto               by MODEL_PATH in training.sh: rwkv-g1 for G1 models, else rwkv-world; it says which     自动选择，并告知
#   rwkv-world         User: ... Assistant: ...  with a blank line between: all RWKV World models      通用
#   rwkv-g1            the same for G1 models: answers keep their blank lines and thoughts             G1 模型
#   rwkv-g1-think      the answer begins with <think: always a thought                                 总是先思考
#   rwkv-g1-think-cue  the same, with (think) behind the question; -think-bit, -think-lot: (think a bit), (think a lot)  控制思考长度
#   rwkv-g1-fakethink  an empty thought, <think></think>, before every answer: quick and good          空思考
#   rwkv-g1-bot        User✿...✿ Bot✿...✿ from G1h on; also rwkv-g1-bot-think, rwkv-g1-bot-fakethink   ✿ 格式
#   rwkv-g1-tools      function calls: the answer begins with ```json                                  函数调用
#   rwkv-g1-toolcall   function calls in <tool_call>, results in <tool_response>                       函数调用
#   rwkv-g1-function-calling   function calls under ### headings; also ...-think, ...-fakethink        函数调用
#   rwkv-g1-rag        material first, then the question                                               先资料后提问
#   rwkv-g1-fim        fills in the middle: columns prefix, suffix, middle                             中间填空
#   rwkv-qa            Question: ... Answer: ...              rwkv-instruct   Instruction: Input: Response:
#   rwkv-g1-emptythink-2025   the older empty thought, for models trained with it                      旧版空思考
#   alpaca chatml default ext-cat empty                       formats of other models                  其他格式
#   my.json            your own: {"format_user": "Q: {{content}}", "format_assistant": "A: {{content}}"}    自定义模板
PROMPT_TYPE=auto

# How rows end. 结束方式
#   doc    token 0: the end of the document                                          词元 0
#   blank  a blank line, no token 0        both   a blank line, then token 0         空行；空行加词元 0
#   x17    \x17 behind every answer, no token 0                                      每个回答后加 \x17
EOT=doc

# Token 0 before every row: 0 no, 1 yes. auto: as the clients of the template begin (docs/data.md): no, but for the Bot format.
# chat.sh, samples and exports follow what was trained. 每行开头是否加词元 0，auto 与该模板的客户端一致
BOS=auto

# What rows are. auto finds it for every row by its columns; others: text alpaca sharegpt openai prompt-completion (or the
# field's names, like AlpacaStyleInstructionHandler).                                   行的类型，auto 自动识别
HANDLER=auto

# Other names of columns, as JSON: '{"prompt": "question", "response": "reply"}'. Keys: prompt query response system history
# messages text tools think images; role and content for keys of messages. "body.messages" is a key inside an object. A part
# that is to be left out has the name "".                                               自定义列名
MAP_KEYS=""

# Other names of those who speak, as JSON: '{"customer": "user", "agent": "assistant"}'. Roles: system user assistant tool; ""
# leaves the messages of a role out.                                                    自定义角色名
ROLE_MAP=""

# What a document is in .txt: file (all of it), line, or paragraph (up to a blank line). txt 文件中一篇文档的划分
TXT_MODE=file

# The encoding of text files. auto finds it for each file, says which it is, and refuses where that is not sure. A name (utf-8
# gb18030 big5 cp932 cp949 cp1252 ...) counts for all files.                         文本编码，auto 自动识别，不确定时拒绝
ENCODING=auto

# 1: undo mojibake (UTF-8 that was read as cp1252 and saved: "Ã©" for "é") where every byte can be restored. 修复乱码
REPAIR=1

# 1: rewrite what was made for another tool, where it can be read in one way only: headings (用户：/助手：, Q:/A:, ChatML tags, ...)
# become turns of PROMPT_TYPE, \n written as letters becomes a line break, end tokens of other models go. The report counts such
# rows in any case. On the command line: --convert-headings.                          把其他格式的标题、转义和结束符改写成本模板
CONVERT_HEADINGS=0

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

# What happens to what is longer. A cut adds nothing: the model does not learn to stop from a row that lost its end. 超长处理；
#   被截断处不补结束符，也不会学到停止
#   drop            the row is left out, and counted                      丢弃整行
#   truncate        its end is cut off; TARGET_LENGTH: the row ends in that answer     截断结尾；TARGET_LENGTH：该行到此为止
#   truncate-left   its beginning is cut off                              截断开头
#   split           the row becomes several (MAX_TOKENS only)             切成多行
OVERLONG=drop

################################################## Rest  其他 #######################################################

# Percent of the rows that are held out in NAME.valid, never trained on; equal rows stay together. 留作验证的百分比
VALID_PERCENT=0

# The part of the data that becomes NAME.valid instead: a list of a .json ("test"), the files of a folder or the sheets of a
# workbook that are named so, or the rows with that value in a column called split. Empty: such parts are not used, and are
# named in the report. 作为验证集的部分（如 test：列表、文件、工作表，或 split 列的值）；为空则不使用，仅在报告中列出
VALID_SPLIT=""

# Any whole number; the same number gives the same order of rows. 随机种子，相同种子顺序相同
SEED=42

# Processes that encode. auto: every core, where there is work for it. The result is the same. 进程数，结果不变
WORKERS=auto

# 1: encode again even if nothing has changed since the last time. 强制重新编码
OVERWRITE_CACHE=0

set +a
if [ $# -eq 0 ]; then set -- --help; fi
exec "$_root/rwkv_peft/run.sh" tokenize "${BASH_SOURCE[0]}" "$@"
