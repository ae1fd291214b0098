"""Run in a process of its own: commands of Noria one after another, each with its exit code, words and memory.

Usage: hostile_child.py, one JSON list of arguments a line on standard input. Prints a JSON object a line:
code, out, err, and by how many bytes the process's peaks grew: of memory used and of memory asked for.
"""

import contextlib
import io
import json
import sys
import traceback

import torch

from noria.__main__ import main


def peak_nbytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) * 1024


def run(argv):
    out, err = io.StringIO(), io.StringIO()
    before = [peak_nbytes(key) for key in ("VmHWM", "VmPeak")]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except BaseException:  # noqa: BLE001 - SystemExit too: the test reads it
            code = -1
            traceback.print_exc()
    used, asked = (peak_nbytes(key) - old for key, old in zip(("VmHWM", "VmPeak"), before, strict=True))
    return {"code": code, "out": out.getvalue()[-3000:], "err": err.getvalue()[-3000:], "used": used, "asked": asked}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
