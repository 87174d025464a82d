"""python -m json2binidx: ./make_tokenize.sh without bash."""

import sys

from rwkv_peft.cli.tokenize import main
from rwkv_peft.common.paths import ROOT
from rwkv_peft.config.shell import parse_assignments

if __name__ == "__main__":
    script = ROOT / "make_tokenize.sh"
    main([str(script), *sys.argv[1:]], parse_assignments(script))
