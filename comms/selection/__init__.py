"""Selection: which algorithm carries out a collective fastest on a network, how long it takes, and why."""
