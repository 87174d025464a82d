"""Start a command: run.py COMMAND ARGUMENTS...

Not `python -m`: that would look for the kit in the current folder first, and find another copy of it there. Lightning starts
further processes by this very command.
"""

import importlib
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

# what copies of the scripts from before 2026-12 say
OLD_NAMES = {
    "rwkv_peft.train": "train",
    "rwkv_peft.chat": "chat",
    "rwkv_peft.init": "init_model",
    "json2binidx": "tokenize",
}

if __name__ == "__main__":
    command = OLD_NAMES.get(sys.argv[1], sys.argv[1])
    importlib.import_module(f"rwkv_peft.cli.{command}").main(sys.argv[2:])
