"""Runs scripts without the seconds that each takes to import torch: a process that has done so forks one for each.

    python tests/warm.py          # reads requests, a line of JSON each; see `Warm` in conftest.py

For each it prints the number of the new process and, when that has ended, its exit code.
"""
import gc
import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def next_request() -> dict:
    """Returns in a new process for each request; this one ends with its input."""
    for line in sys.stdin:
        if not (pid := os.fork()):
            return json.loads(line)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


sys.path[0] = str(ROOT)
import torch._dynamo  # noqa: E402, F401, as every optimizer does
import torch.utils.tensorboard  # noqa: E402, F401

import data.pipeline  # noqa: E402, F401
import engine.run  # noqa: E402, F401
import models  # noqa: E402, F401
import utils.pictures  # noqa: E402, F401

# What is imported stays. Without this, a process would take two seconds to look for garbage in it when it ends.
gc.collect()
gc.freeze()
request = next_request()
os.setsid()
for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, request['out'], os.O_WRONLY),
                            (2, request['err'], os.O_WRONLY)):
    os.dup2(os.open(name, flags), number)
os.chdir(request['cwd'])
os.environ.clear()
os.environ.update(request['environment'])
sys.argv = request['command']
module = request['module']
sys.path[0] = str(ROOT if module else Path(sys.argv[0]).parent)
# At the level of the module, so that whatever the script ends with ends this process as it would end the script's.
if module:
    runpy.run_module(module, run_name='__main__', alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name='__main__')
