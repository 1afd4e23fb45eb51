"""Makes the helpers of this folder importable, whose name is also the pack's."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
