"""The test suite. servers, faults, workers and oracle are its tools; bench/ uses servers too."""
