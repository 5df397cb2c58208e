"""What ours is compared with: lightly's blocks, and loops over images in NumPy."""
