"""How the bundled model is made; `scripts/train_testbed.py` runs it."""
