"""`hf-teleport train image_classification` as a script, for `accelerate launch`."""

import sys

from hf_teleport.tasks.image_classification import main

if __name__ == "__main__":
    main(sys.argv[1:])
