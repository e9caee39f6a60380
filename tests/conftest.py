"""What all tests share."""

import torch

# The tests' tensors are tiny: one thread is faster than several, and far faster where other
# processes want the processor too.
torch.set_num_threads(1)
