"""What can this machine run, how right and how fast: `python -m kernels_check`."""
