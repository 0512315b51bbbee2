"""The smallest models and the writer of shards are importable."""

import sys
from pathlib import Path

sys.path.extend([str(Path(__file__).parents[1] / "model"), str(Path(__file__).parents[1])])
