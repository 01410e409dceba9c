"""A script whose second process fails every time, the first two times after it has finished an iteration."""

import os
import sys
import time
from pathlib import Path

metrics = Path(sys.argv[sys.argv.index("--output_dir") + 1]) / "metrics.jsonl"
if os.environ["RANK"] == "1":
    finished = metrics.read_text() if metrics.exists() else ""
    if finished.count("\n") < 2:
        metrics.parent.mkdir(exist_ok=True)
        metrics.write_text(finished + "{}\n")
    raise RuntimeError("out of widgets")
time.sleep(60)
