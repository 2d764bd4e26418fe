"""What only a GPU can prove: ``make test-gpu``. Every test has a twin on the CPU, marked slow, that shows its logic to be right where there is no GPU."""
