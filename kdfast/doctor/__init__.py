"""What `kdfast doctor` tells: what is built and installed, how fast the machine is, and what an operator costs on it."""
