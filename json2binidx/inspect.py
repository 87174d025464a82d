"""python -m json2binidx.inspect: show and check a .bin/.idx pair."""

import sys

from rwkv_peft.cli.inspect import main

if __name__ == "__main__":
    main(sys.argv[1:])
