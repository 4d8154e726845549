"""The operations that start from hidden states and the weight of the head, and never hold a whole tensor of logits."""
