"""Networks: plain nn.Modules, tensors to tensor. They know nothing of losses, noise or data."""
