"""Make the four `.npy` files of the tutorial: ``python -m data_gen --help``."""
