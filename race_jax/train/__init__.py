"""Training: data, loss, optimizer, mesh, step, checkpoints and the loop that joins them."""
