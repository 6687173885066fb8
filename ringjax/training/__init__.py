"""Training: configs, mesh, loss, optimizer, the compiled step, checkpoints, metrics and the loop around them."""
