"""`hf-teleport train mlm` as a script, for `accelerate launch`."""

import sys

from hf_teleport.tasks.mlm import main

if __name__ == "__main__":
    main(sys.argv[1:])
