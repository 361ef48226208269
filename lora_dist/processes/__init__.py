"""Process management: rendezvous, consistency checks, signals, failures and exit."""
