"""Starts a door: run.py MODULE ARGUMENTS... Not `python -m`: that would look for the kit in the current folder first,
and find another copy of it there. Lightning starts further processes by this very command."""

import importlib
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    importlib.import_module(sys.argv[1]).main(sys.argv[2:])
