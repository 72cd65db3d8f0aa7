"""Every stage in order; what is committed already is skipped.

ray job submit --working-dir . -- python jobs/pipeline.py --config pipeline.yaml
"""

import sys

from hashdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["pipeline", *sys.argv[1:]]))
