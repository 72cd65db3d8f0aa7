"""Features -> kNN graph of the training sample.

ray job submit --working-dir . -- python jobs/build_graph.py --config pipeline.yaml
"""

import sys

from hashdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["graph", *sys.argv[1:]]))
