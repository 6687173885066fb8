"""Several `ringjax tokenize` in one process, which loads and compiles the image tokenizer once.

python scripts/tokenize_all.py < COMMANDS         a line: the arguments of one command, quoted as for a shell
"""

import shlex
import sys

from ringjax import cli

if __name__ == "__main__":
    for line in sys.stdin:
        if arguments := shlex.split(line):
            code = cli.main(["tokenize", *arguments])
            if code:
                sys.exit(code)
