"""What one run on a GPU shows (tools/gpu.sh): each stage is a module, and writes what it found as it finds it."""
