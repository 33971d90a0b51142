"""YAML recipes of `python -m mosa_fast.train --config`."""
