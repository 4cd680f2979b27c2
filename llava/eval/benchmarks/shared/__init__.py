"""What several benchmarks read, write or compute alike."""
