"""Stands for an interpreter: has the program run by tests/warm.py, with this process's files, and ends as it ends.

    python -IS tests/warm_client.py SOCKET -m MODULE OPTIONS…          or -c CODE, or SCRIPT; see `Warm` in conftest.py
"""
import json
import os
import signal
import socket
import sys

with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect(sys.argv[1])
    request = {'words': sys.argv[2:], 'cwd': os.getcwd(), 'environment': dict(os.environ)}
    socket.send_fds(server, [json.dumps(request).encode()], (0, 1, 2))
    process = int(server.recv(99))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: os.kill(process, number))
    code = int(server.recv(99))
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
