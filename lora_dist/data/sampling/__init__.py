"""Which sample comes when: a function of seed, epoch and position, for any number of processes."""
