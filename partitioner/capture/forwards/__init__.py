"""Running a forward to trace it: on a borrowed module, with own functions recorded and random numbers by keys."""
