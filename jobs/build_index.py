"""Codes -> sharded binary index, committed as one version.

ray job submit --working-dir . -- python jobs/build_index.py --config pipeline.yaml
"""

import sys

from hashdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["index", "build", *sys.argv[1:]]))
