"""What is saved and what ends a run: checkpoints from plan to plan, signals at any moment: `python -m state.NAME`."""
