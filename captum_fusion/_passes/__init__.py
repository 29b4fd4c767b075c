"""Passes through the network: the layer pass, and passes on masked, perturbed and replaced samples."""
