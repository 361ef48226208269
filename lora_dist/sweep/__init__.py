"""A search for hyperparameters: training runs on the workers of this machine, with values that Optuna proposes."""
