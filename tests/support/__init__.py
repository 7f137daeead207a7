"""What tests are written with: servers, workers, faults, ledgers, the conformance suites. bench/ uses servers too."""
