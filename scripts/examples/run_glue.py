"""`hf-teleport train glue` as a script, for `accelerate launch`."""

import sys

from hf_teleport.tasks.glue import main

if __name__ == "__main__":
    main(sys.argv[1:])
