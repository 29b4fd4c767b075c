from __future__ import annotations

import torch

# Small networks run fastest on one thread, and two test runs on one machine do not slow each other down.
torch.set_num_threads(1)
