"""Settings every test shares: no network, two threads (or OMP_NUM_THREADS), a fixed seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import pytest
import torch
from transformers import set_seed

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True)
def fixed_seed():
    set_seed(0)
