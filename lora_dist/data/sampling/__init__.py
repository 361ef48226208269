"""The order of the samples, as a function of seed, epoch and position, for any number of processes."""
