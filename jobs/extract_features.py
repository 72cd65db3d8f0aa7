"""Collection -> features: lists the images and commits one feature vector for each.

ray job submit --working-dir . -- python jobs/extract_features.py --config pipeline.yaml
"""

import sys

from hashdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["features", *sys.argv[1:]]))
