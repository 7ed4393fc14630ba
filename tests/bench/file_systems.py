"""A training on a mounted file system: killed on one mount, resumed on the same or another one, compared with a local run.

`PYTHONPATH=tests python tests/bench/file_systems.py --first MOUNT [--second MOUNT] [--pause SECONDS] [--local_cache]`

Two mounts of one file system stand for two nodes: `--second` is where the run is resumed, `--pause` seconds after the kill. The
last line is a JSON object: what the second mount saw, the step it resumed from, and the results that differ from the local run.
"""

import argparse
import json
import os
import re
import signal
import tempfile
import time
from pathlib import Path

from support import small_run
from support.processes import wait_until


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a training on a mounted file system, resume it, compare it.")
    parser.add_argument("--first", type=Path, required=True, help="Mount on which the training is killed.")
    parser.add_argument("--second", type=Path, help="Mount on which it is resumed; default: the same.")
    parser.add_argument("--pause", type=float, default=0.0, help="Seconds between the kill and the second start.")
    parser.add_argument("--local_cache", action="store_true", help="Keep tokens and features on the local disk.")
    options = parser.parse_args()
    local = Path(tempfile.mkdtemp(prefix="file-systems-"))
    reference = small_run.finish(local / "reference")
    name = local.name

    def places(mount: Path) -> list[str]:
        cache = local / "cache" if options.local_cache else mount / name / "cache"
        return ["--run.dir", str(mount / name), "--data.cache_dir", str(cache)]

    job = small_run.start(local / "first", *places(options.first))
    checkpoints = options.first / name / "small" / "checkpoints"
    assert wait_until(lambda: list(checkpoints.glob("step-*")) or job.has_ended(), 120)
    time.sleep(0.3)
    assert not job.has_ended(), small_run.read_log(local / "first")
    for pid in job.pids:
        os.kill(pid, signal.SIGKILL)
    job.kill()
    time.sleep(options.pause)
    mount = options.second or options.first
    run = mount / name / "small"
    seen = sorted(path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("."))
    job = small_run.start(local / "second", *places(mount))
    assert wait_until(job.has_ended, 300)
    log = small_run.read_log(local / "second")
    resumed = re.search(r"resumed from step (\d+)", log)
    record = {"mounts": [str(options.first), str(mount)], "pause": options.pause, "local_cache": options.local_cache}
    record |= {"seen": seen, "exit_codes": job.codes(), "resumed_from": int(resumed[1]) if resumed else 0}
    record["errors"] = [line[:300] for line in log.splitlines() if "error: " in line or "is damaged" in line]
    job.kill()
    # A mounted bucket cannot read a renamed directory before it is uploaded.
    time.sleep(10.0)
    record["differences"] = small_run.differences(run, reference) if not any(record["exit_codes"]) else ["not finished"]
    print(json.dumps(record, allow_nan=False))


if __name__ == "__main__":
    main()
