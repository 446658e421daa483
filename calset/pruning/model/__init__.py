"""A model folder and the weights in it: blocks, matrices, stored tensors, memory. Must not know methods."""
