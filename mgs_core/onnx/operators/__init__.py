"""One registered function for each operator, by family."""
