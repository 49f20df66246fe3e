"""No test talks to a server, whatever keys the environment holds, and each process computes with one thread.

Tests run in as many processes as there are cores: with more threads than one in each they wait for each other most of
the time. And sums, and with them the numbers that tests hold training to, depend on the number of threads.
"""

import os
import socket

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in the processes that tests start
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("WANDB_API_KEY", None)


def free_port() -> int:
    """Where processes of a test can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
