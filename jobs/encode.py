"""Model + features -> codes of the whole collection.

ray job submit --working-dir . -- python jobs/encode.py --config pipeline.yaml
"""

import sys

from hashdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["encode", *sys.argv[1:]]))
