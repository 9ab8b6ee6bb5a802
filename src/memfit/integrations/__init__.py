"""Where people train: one file for each framework, imported only when asked for."""
