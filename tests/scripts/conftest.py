import sys
from pathlib import Path

# The scripts import each other by name, as `python scripts/report.py` lets them.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
