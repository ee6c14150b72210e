"""`hf-teleport train clm` as a script, for `accelerate launch`."""

import sys

from hf_teleport.tasks.clm import main

if __name__ == "__main__":
    main(sys.argv[1:])
