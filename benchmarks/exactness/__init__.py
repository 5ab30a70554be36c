"""Are split runs the same training? Random small runs, and models as people use them: `python -m exactness.NAME`."""
