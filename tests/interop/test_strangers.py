"""Files from strangers: nothing hangs, nothing outside is read, memory stays under 2 GiB.

One process opens them all (`tests.hostile_files`); its parent ends it when one takes more than ten
seconds or the process more than two GiB, and says which file that was.
"""

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.hostile_files import CASES, SECRET

SECONDS, MEMORY = 10, 2 * 2**30
# Other processes may take the processor: what is waited for is ten seconds of it.
WAITED = 60
TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def peak_memory(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0


def watch(command) -> dict[str, dict]:
    """What the command says of each case, up to one that breaks a limit."""
    lines: queue.Queue = queue.Queue()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        threading.Thread(
            target=lambda: [*map(lines.put, process.stdout), lines.put("")], daemon=True
        ).start()
        results, running, begun, used = {}, None, time.monotonic(), 0.0
        imports = True
        try:
            while True:
                try:
                    line = lines.get(timeout=0.05)
                except queue.Empty:
                    line = None
                if line == "":
                    break
                if line and "begun" in (found := json.loads(line)):
                    running, begun, imports = found["begun"], time.monotonic(), False
                    used = processor_seconds(process.pid)
                elif line:
                    results[found["name"]] = found
                elif process.poll() is None:
                    limit = 300 if imports else WAITED
                    spent = processor_seconds(process.pid) - used
                    peak = peak_memory(process.pid)
                    if (spent > SECONDS and not imports) or time.monotonic() - begun > limit:
                        results[running] = {"error": f"ended after {spent:.1f} s", "message": ""}
                        break
                    if peak > MEMORY:
                        results[running] = {"error": f"ended at {peak} bytes", "message": ""}
                        break
        finally:
            process.kill()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strangers")
    return watch([sys.executable, "-m", "tests.hostile_files", str(folder)])


@pytest.mark.parametrize("name", CASES)
def test_a_file_from_a_stranger_is_refused_at_once(results, name):
    assert name in results, f"the process ended before it: {list(results)[-1:]}"
    found, (_, says) = results[name], CASES[name]
    if not says:
        assert (found["error"], found["message"]) == ("", "")
        return
    assert found.get("known"), found  # an error of ours, not a trace
    assert re.search(says, found["message"]), found["message"]
    assert len(found["message"]) < 4000
    assert SECRET[:10] not in found["message"]
    assert "allow_pickle" not in found["message"] and "weights_only=False" not in found["message"]
