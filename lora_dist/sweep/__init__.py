"""A search for hyperparameters: several training runs at a time, with values that Optuna proposes."""
