"""Independent implementations that tests and benchmarks compare this project with."""
