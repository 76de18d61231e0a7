"""Trains the modules of learned methods while the model that they serve stays frozen; needs `foveate[train]`."""
