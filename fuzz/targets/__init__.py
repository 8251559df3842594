"""The targets, one file each; each file's `TARGET` is what is run."""
