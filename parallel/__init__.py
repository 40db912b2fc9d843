"""Many devices: meshes, placement of states and batches."""
