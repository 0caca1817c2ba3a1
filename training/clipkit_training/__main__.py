"""`torchrun --nproc-per-node 2 -m clipkit_training RECIPE.yaml`: `clipkit train` on many processes."""

import sys

from clipkit.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
