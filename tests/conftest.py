"""What every test shares: one thread for torch, so that runs repeat exactly and workers do not fight."""

import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """Threads change the order of float sums; the tests' own threads are their subject, torch's are not."""
    before = torch.get_num_threads()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
