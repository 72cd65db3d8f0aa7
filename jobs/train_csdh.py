"""Graph -> model: trains CSDH on the Ray cluster; resumes from its newest checkpoint.

ray job submit --working-dir . -- python jobs/train_csdh.py --config pipeline.yaml
"""

import sys

from hashdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:], "--train.method=csdh"]))
