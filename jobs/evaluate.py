"""Codes -> mAP, precision and recall by a protocol.

ray job submit --working-dir . -- python jobs/evaluate.py --config pipeline.yaml
"""

import sys

from hashdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
