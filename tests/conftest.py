"""What tests of several rooms share lies beside the tests of the room it belongs to."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "training"))  # worlds: functions run as ranks of a gloo world
