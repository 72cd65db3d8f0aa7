"""Collection + index -> next version of the index, with only what changed encoded.

ray job submit --working-dir . -- python jobs/reindex.py --config pipeline.yaml
"""

import sys

from hashdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["reindex", *sys.argv[1:]]))
