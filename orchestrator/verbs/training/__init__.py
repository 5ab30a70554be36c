"""Training jobs: the step, its loop, what ends it, and how a run goes on."""
