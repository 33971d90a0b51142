"""These run in a process of their own, with TRITON_INTERPRET=1 set before Triton is imported: `test_interpreted.py`."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
