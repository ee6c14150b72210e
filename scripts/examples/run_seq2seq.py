"""`hf-teleport train seq2seq` as a script, for `accelerate launch`."""

import sys

from hf_teleport.tasks.seq2seq import main

if __name__ == "__main__":
    main(sys.argv[1:])
