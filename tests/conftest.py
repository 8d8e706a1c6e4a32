"""Tests import the six files from the folder above and run on two threads at most."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
