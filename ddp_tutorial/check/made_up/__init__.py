"""What a script asks for and this machine has not: GPUs, and data sets to download."""
