"""`hf-teleport train time_series` as a script, for `accelerate launch`."""

import sys

from hf_teleport.tasks.time_series import main

if __name__ == "__main__":
    main(sys.argv[1:])
